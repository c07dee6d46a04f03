"""Clipped loss, token weights, importance correction and KL estimates."""

import pytest
import torch

from tealightning.functional.losses import (
    clipped_policy_loss,
    kl_estimate,
    kl_penalty,
    token_weights,
    truncated_importance_weights,
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


def test_truncated_importance_weights_cap_only_from_above():
    trainer = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    engine = torch.tensor([-1.0, -3.0, 0.0])
    weights = truncated_importance_weights(trainer, engine, cap=2.0)
    assert torch.allclose(weights, torch.tensor([1.0, 2.0, torch.e**-1]))
    assert not weights.requires_grad


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
