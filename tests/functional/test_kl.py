import pytest
import torch

from tealightning.functional.losses import kl_estimate, kl_penalty

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
TRUE_KL = float((POLICY * (POLICY / REFERENCE).log()).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimate_is_unbiased_in_exact_expectation(estimator):
    estimate = kl_estimate(POLICY.log(), REFERENCE.log(), estimator)
    assert float((POLICY * estimate).sum()) == pytest.approx(TRUE_KL)


def test_kl_estimate_k3_is_never_negative_and_finite():
    policy = torch.tensor([-100.0, -1.0, 0.0])
    reference = torch.tensor([0.0, -1.0, -100.0])
    estimate = kl_estimate(policy, reference, "k3")
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
        kl_penalty(POLICY.log(), REFERENCE.log(), "k1"), kl_estimate(POLICY.log(), REFERENCE.log(), "k1")
    )


def test_kl_estimate_rejects_an_unknown_name():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(POLICY, REFERENCE, "k4")
