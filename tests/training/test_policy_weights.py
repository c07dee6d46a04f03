"""Weights that are handed out to engines."""

from torch import nn

from tealightning.training.policy_weights import policy_weights, weight_names


def test_without_an_adapter_weights_are_the_parameters_and_nothing_is_merged(monkeypatch):
    for merging in ("merged_parameters", "merged_names"):
        monkeypatch.setattr(f"tealightning.training.policy_weights.{merging}", None)
    policy = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    policy.append(nn.Linear(3, 3))
    policy[2].weight = policy[1].weight  # tied: pushed under both names
    weights = dict(policy_weights(policy))
    assert weights.keys() == weight_names(policy) == set(policy.state_dict())
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        assert weights[name].data_ptr() == parameter.data_ptr()  # not a copy
        assert not weights[name].requires_grad
