"""Clipped loss, token weights, importance correction and KL estimates."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tealightning.functional.losses import (
    ImportanceMode,
    clipped_policy_loss,
    importance_weights,
    kl_estimate,
    kl_penalty,
    token_weights,
)


def test_clipped_policy_loss_is_the_policy_gradient_at_ratio_one():
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0])
    loss, clipped = clipped_policy_loss(log_probs, log_probs.detach(), advantages, clip_lower=0.2, clip_upper=0.2)
    assert loss.tolist() == [[-2.0, -2.0], [3.0, 3.0]]
    assert not clipped.any()
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [[-2.0, -2.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "is_clipped"),
    [
        (1.5, 1.0, -1.3, True),  # gain beyond 1 + clip_upper is not rewarded
        (1.5, -1.0, 1.5, False),  # but a loss is felt in full
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),  # below 1 - clip_lower nothing is left to gain
        (1.1, 1.0, -1.1, False),
    ],
)
def test_clipped_policy_loss_bounds(ratio, advantage, expected, is_clipped):
    behaviour = torch.tensor([[-1.0]], dtype=torch.float64)
    policy = behaviour + torch.tensor(ratio, dtype=torch.float64).log()
    loss, clipped = clipped_policy_loss(
        policy, behaviour, torch.tensor([advantage], dtype=torch.float64), clip_lower=0.2, clip_upper=0.3
    )
    assert loss.item() == pytest.approx(expected)
    assert clipped.item() is is_clipped


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]),
        ("sequence_mean", [[1 / 6, 1 / 6, 1 / 6], [0.5, 0.0, 0.0]]),
        ("constant", [[0.05, 0.05, 0.05], [0.05, 0.0, 0.0]]),
    ],
)
def test_token_weights_of_each_reduction(reduction, expected):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights = token_weights(
        mask, reduction, num_tokens=torch.tensor(4.0), num_sequences=torch.tensor(2.0), constant=10.0
    )
    assert torch.allclose(weights, torch.tensor(expected))


def test_token_weights_of_an_empty_batch_are_finite():
    mask = torch.zeros(1, 2, dtype=torch.bool)
    for reduction in ("token_mean", "sequence_mean", "constant"):
        weights = token_weights(
            mask, reduction, num_tokens=torch.tensor(0.0), num_sequences=torch.tensor(0.0), constant=1.0
        )
        assert weights.tolist() == [[0.0, 0.0]]


TRAINER = torch.tensor([[-1.0, -1.0, -1.0, 0.0], [-1.0, -2.0, 0.0, 0.0]])
ENGINE = torch.tensor([[-1.0, -3.0, 0.0, 0.0], [-2.0, -1.5, 0.0, 0.0]])  # log-ratios 0, 2, -1 and 1, -0.5
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", {"upper": 2.0}, [[1, 2, math.exp(-1), 1], [2, math.exp(-0.5), 1, 1]]),
        ("token_truncate", {"upper": 2.0, "lower": 0.5}, [[1, 2, 0.5, 1], [2, math.exp(-0.5), 1, 1]]),
        ("token_mask", {"upper": 2.0}, [[1, 0, math.exp(-1), 1], [0, math.exp(-0.5), 1, 1]]),
        ("token_mask", {"upper": 2.0, "lower": 0.5}, [[1, 0, 0, 1], [0, math.exp(-0.5), 1, 1]]),
        ("sequence_truncate", {"upper": 2.0}, [[2], [math.exp(0.5)]]),
        ("sequence_truncate", {"upper": math.inf, "lower": 2.0}, [[math.e], [2]]),
        ("sequence_mask", {"upper": 2.0}, [[0], [math.exp(0.5)]]),
        ("sequence_mask", {"upper": math.inf, "lower": 2.0}, [[math.e], [0]]),
    ],
)
def test_importance_weights_of_each_mode(mode, bounds, expected):
    trainer = TRAINER.clone().requires_grad_()
    weights, outside = importance_weights(trainer, ENGINE, MASK, mode, **bounds)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert not weights.requires_grad and outside.shape == weights.shape


def test_importance_ratios_at_a_bound_are_inside():
    weights, outside = importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), MASK[:1, :1], "token_mask", upper=1.0)
    assert weights.item() == 1.0 and not outside.item()


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from(get_args(ImportanceMode)),
    st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    st.floats(1, 1e6),
)
def test_importance_weights_are_those_of_a_loop_over_tokens(rows, mode, lower, upper):
    """Also at ratios that no float holds; and padding, of whatever value, is nothing."""
    length = max(map(len, rows)) + 1
    log_ratios = torch.tensor([row + [7.0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    weights, outside = importance_weights(log_ratios, torch.zeros(1), mask, mode, lower=lower, upper=upper)
    assert weights.isfinite().all()
    for r, row in enumerate(rows):
        for t, value in enumerate(row):
            ratio = math.exp(min(math.fsum(row) if mode.startswith("sequence") else value, 20.0))
            if math.isclose(ratio, lower, rel_tol=1e-5) or math.isclose(ratio, upper, rel_tol=1e-5):
                continue  # rounding decides
            is_outside = not lower <= ratio <= upper
            limited = 0.0 if mode.endswith("mask") and is_outside else min(max(ratio, lower), upper)
            where = (r, 0 if mode.startswith("sequence") else t)
            assert outside[where].item() == is_outside
            assert weights[where].item() == pytest.approx(limited, rel=1e-5, abs=1e-30)


def test_a_log_prob_that_is_no_number_stays_one_in_every_mode():
    """NaN is no drift: the step is skipped and counted, not masked."""
    for mode in get_args(ImportanceMode):
        weights, _ = importance_weights(torch.full((1, 1), math.nan), ENGINE[:1, :1], MASK[:1, :1], mode, upper=2.0)
        assert weights.isnan().all()


POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
TRUE_KL = float((POLICY * (POLICY / REFERENCE).log()).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimate_is_unbiased_in_exact_expectation(estimator):
    estimate = kl_estimate(POLICY.log() - REFERENCE.log(), estimator)
    assert float((POLICY * estimate).sum()) == pytest.approx(TRUE_KL)


def test_kl_estimate_k3_is_never_negative_and_finite():
    policy = torch.tensor([-100.0, -1.0, 0.0])
    reference = torch.tensor([0.0, -1.0, -100.0])
    estimate = kl_estimate(policy - reference, "k3")
    assert (estimate >= 0).all() and estimate.isfinite().all()
    assert estimate[1] == 0


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_kl_penalty_gradient_is_that_of_the_exact_kl(estimator):
    """Expectation under the policy of the sampled gradient against the derivative of the closed form."""
    logits = POLICY.log().clone().requires_grad_()
    log_policy = logits.log_softmax(0)
    exact = (log_policy.exp() * (log_policy - REFERENCE.log())).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    log_policy = logits.log_softmax(0)
    sampled = (
        POLICY * kl_penalty(log_policy, REFERENCE.log(), estimator)
    ).sum()  # POLICY: sampling carries no gradient
    (actual,) = torch.autograd.grad(sampled, logits)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_kl_penalty_k1_keeps_its_value():
    assert torch.allclose(
        kl_penalty(POLICY.log(), REFERENCE.log(), "k1"), kl_estimate(POLICY.log() - REFERENCE.log(), "k1")
    )


def test_kl_estimate_rejects_an_unknown_name():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(POLICY - REFERENCE, "k4")
