"""Estimates of the KL divergence to a reference from sampled tokens."""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(policy_log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of `KL(policy || reference)` at tokens sampled from the policy (Schulman 2020).

    With `d = log pi - log ref`: k1 = d (unbiased, noisy, negative at times), k2 = d^2/2 (biased, low noise),
    k3 = exp(-d) - 1 + d (unbiased, never negative). `d` above 20 in size is clamped in k3's exponential.

    Returns:
        Same shape as the log-probs, in nats.
    """
    difference = policy_log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return (-difference).clamp(max=20.0).exp() - 1 + difference
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator!r}.")


def kl_penalty(policy_log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """`kl_estimate` as a differentiable loss term.

    k2 and k3 are differentiated as they are: k2's gradient `d * grad log pi` is the unbiased gradient of the per-token
    KL, k3's is the field's usual one (that of the forward KL in expectation). The gradient of k1 has mean zero and
    would penalise nothing, so k1 keeps its value and takes k2's gradient.
    """
    if estimator == "k1":
        k2 = kl_estimate(policy_log_probs, ref_log_probs, "k2")
        return kl_estimate(policy_log_probs, ref_log_probs, "k1").detach() + k2 - k2.detach()
    return kl_estimate(policy_log_probs, ref_log_probs, estimator)
