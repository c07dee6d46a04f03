"""Weights that are handed out to engines."""

import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from tealightning.training import policy_weights as module
from tealightning.training.policy_weights import policy_weights, tied_weight_names, weight_names


def test_weights_of_a_plain_module_are_its_own_not_copies():
    policy = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    policy.append(nn.Linear(3, 3))
    policy[2].weight = policy[1].weight
    weights = dict(policy_weights(policy))
    assert weights.keys() == weight_names(policy) == set(policy.state_dict()) - {"2.weight"}
    assert tied_weight_names(policy) == {"1.weight": ["2.weight"]}
    for name, parameter in policy.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_weights_are_those_that_save_pretrained_writes(name, tmp_path, monkeypatch):
    tiny_model(name).save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)  # knows how it was converted
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    read, most = [], 0
    monkeypatch.setattr(module, "whole", lambda tensor: read.append(tensor) or tensor)
    weights = {}
    for key, tensor in policy_weights(policy):
        most = max(most, len(read))
        read.clear()
        weights[key] = tensor
    assert weights.keys() == saved.keys() == weight_names(policy)
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    layers = Counter(re.match(r".*?\.\d+\.|.*", key)[0] for key in policy.state_dict())
    assert most <= max(layers.values())  # one layer is read at a time
    tied = [other for others in tied_weight_names(policy).values() for other in others]
    assert len(tied) == len(list(policy.named_parameters(remove_duplicate=False))) - len(list(policy.parameters()))
