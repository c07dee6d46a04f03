"""Importance weights in a training step: what each mode leaves of the gradient, whatever the split."""

import math

import pytest
import torch
from module_fixtures import make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama

from tealightning import PolicyGradientLoss, PostTrainingModule
from tealightning.estimators import build_estimator
from tealightning.training.scoring import score_completions

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
BOUNDS = {"importance_cap": 1.5, "importance_min": 0.5}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, estimator="grpo", **kwargs):
    loss = PolicyGradientLoss(**kwargs.pop("loss"))
    settings = {"gradient_clip_norm": None, "advantage_scale": "none"} | kwargs
    optimizer = settings.pop("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return PostTrainingModule(policy, build_estimator(estimator), loss=loss, optimizer=optimizer, **settings)


def drifted_rollouts():
    """Rollouts whose engine differs from the trainer by normal noise of 0.3 nats a token; and by how much."""
    rollouts = make_rollouts(REWARDS)
    drift = 0.3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1)) * rollouts.completion_mask
    rollouts.rollout_log_probs = log_probs_of(tiny_llama(), rollouts).detach() - drift
    return rollouts, drift


def log_probs_of(model, rollouts):
    """[8, 6], 0 on padding."""
    log_probs = score_completions(model, rollouts, torch.arange(8)).log_probs
    return torch.nn.functional.pad(log_probs, (0, 6 - log_probs.shape[1]))


def weight_by_hand(mode, drift):
    """[B][T] weights, one number after the other."""
    weights = []
    for row in drift.tolist():
        ratios = [math.exp(value) for value in row]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios)] * len(ratios)
        if mode.endswith("mask"):
            weights.append([ratio if 0.5 <= ratio <= 1.5 else 0.0 for ratio in ratios])
        else:
            weights.append([min(max(ratio, 0.5), 1.5) for ratio in ratios])
    return torch.tensor(weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_gradient_is_the_weighted_textbook_sum(policy, mode, reduction):
    """What is masked stays in the denominators: tokens and completions are counted as without a mask."""
    rollouts, drift = drifted_rollouts()
    lengths, mask = rollouts.completion_lengths, rollouts.completion_mask
    _, (gradient,) = run_steps(
        module_of(policy, "mean_reward", loss={"reduction": reduction, "importance_mode": mode, **BOUNDS}),
        [make_batch(rollouts)],
    )
    per_token = {
        "token_mean": torch.full((8, 1), 1 / float(lengths.sum())),
        "sequence_mean": 1 / (8 * lengths[:, None].float()),
        "constant": torch.full((8, 1), 1 / (8 * 6)),
    }[reduction]
    advantages = (rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)).flatten().float()
    model = tiny_llama()
    log_probs = log_probs_of(model, rollouts)
    weights = per_token * weight_by_hand(mode, drift) * mask
    (-(weights * advantages[:, None] * log_probs).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert expected.abs().max() > 1e-2
    assert torch.allclose(gradient, expected, atol=1e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [{"micro_batch_size": 3}, {"micro_batch_size": 1}, {"micro_batch_tokens": 20}])
def test_a_split_into_micro_batches_changes_nothing(policy, mode, split):
    rollouts, _ = drifted_rollouts()
    loss = {"importance_mode": mode, "kl_coef": 0.1, **BOUNDS}
    results = [run_steps(module_of(policy, loss=loss, **kwargs), [make_batch(rollouts)]) for kwargs in ({}, split)]
    (whole, (expected,)), (parts, (gradient,)) = results
    assert expected.abs().max() > 1e-3 and torch.allclose(gradient, expected, atol=1e-5)
    key = "train/importance_clip_fraction"
    assert parts.callback_metrics[key] == whole.callback_metrics[key] > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_fraction_outside_the_bounds_is_counted_over_tokens(policy, mode):
    rollouts, drift = drifted_rollouts()
    trainer, _ = run_steps(module_of(policy, loss={"importance_mode": mode, **BOUNDS}), [make_batch(rollouts)])
    if mode.startswith("sequence"):
        drift = drift.sum(dim=1, keepdim=True)
    outside = ((drift.exp() > 1.5) | (drift.exp() < 0.5)) & rollouts.completion_mask
    expected = float(outside.sum() / rollouts.completion_mask.sum())
    assert 0 < expected < 1
    assert float(trainer.callback_metrics["train/importance_clip_fraction"]) == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_inner_epochs_keep_the_ratio_of_the_weights_that_the_step_began_with(policy, mode):
    """The policy moves between the epochs; its own ratio is clipped, the engine's stays what it was."""
    rollouts, drift = drifted_rollouts()
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.005), "inner_epochs": 2}
    loss = {"clip_lower": 1.0, "clip_upper": 1e6}
    kwargs = {"loss": loss | {"importance_mode": mode, **BOUNDS}} | settings
    _, (first, second) = run_steps(module_of(policy, "mean_reward", **kwargs), [make_batch(rollouts)])
    model = tiny_llama()
    state, start = 0, log_probs_of(model, rollouts).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.005 * first[state : state + parameter.numel()].view_as(parameter)
            state += parameter.numel()
    advantages = (rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)).flatten().float()
    log_probs = log_probs_of(model, rollouts)
    weights = weight_by_hand(mode, drift) * rollouts.completion_mask / rollouts.completion_lengths.sum()
    (-(weights * advantages[:, None] * (log_probs - start).exp()).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(second, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask"])
def test_rollouts_that_drifted_far_leave_a_step_without_policy_gradient(policy, mode):
    """500 nats a token: a ratio that no float holds."""
    rollouts, _ = drifted_rollouts()
    rollouts.rollout_log_probs = rollouts.rollout_log_probs - 500.0
    loss = {"importance_cap": 2.0, "importance_mode": mode}
    trainer, (gradient,) = run_steps(module_of(policy, loss=loss), [make_batch(rollouts)])
    assert trainer.callback_metrics["train/importance_clip_fraction"] == 1.0
    assert gradient.abs().max() == 0.0 and trainer.callback_metrics["train/nonfinite_steps"] == 0


def test_without_a_cap_there_is_no_such_metric(policy):
    trainer, _ = run_steps(module_of(policy, loss={}), [make_batch(make_rollouts(REWARDS))])
    assert "train/importance_clip_fraction" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"importance_cap": 2.0, "importance_mode": "sequence"}, "importance_mode must be one of token_truncate"),
        ({"importance_cap": 2.0, "importance_min": -0.1}, "importance_min must be a finite number of at least 0"),
        ({"importance_cap": 2.0, "importance_min": 2.0}, r"importance_min must be below loss.importance_cap \(2.0\)"),
    ],
)
def test_bounds_that_cannot_be_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradientLoss(**field)


@pytest.mark.parametrize("field", [{"importance_mode": "token_mask"}, {"importance_min": 0.5}])
def test_a_mode_without_a_cap_is_warned_about(field):
    with pytest.warns(UserWarning, match=f"loss.{next(iter(field))} has no effect without loss.importance_cap"):
        PolicyGradientLoss(**field)
