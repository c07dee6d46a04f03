"""The clipped policy-gradient loss, its token weights, importance correction, and estimates of the KL divergence.

Per-token tensors are [rows, T].
"""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "constant"]


def clipped_policy_loss(
    policy_log_probs: Tensor, behaviour_log_probs: Tensor, advantages: Tensor, *, clip_lower: float, clip_upper: float
) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss per token, with `r = pi / behaviour`:

        -min(r A, clip(r, 1 - clip_lower, 1 + clip_upper) A)

    PPO (Schulman et al. 2017) with separate bounds as in DAPO (Yu et al. 2025). Behaviour is the policy at the start of
    the step; equal values give r = 1 and the plain policy gradient. `advantages` are [rows].

    Returns: (loss [rows, T], clipped [rows, T] bool: where the clipped branch won and the gradient is zero)

    >>> new, old = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
    >>> clipped_policy_loss(new, old, torch.ones(1), clip_lower=0.2, clip_upper=0.2)
    (tensor([[-1.2000, -1.0000]]), tensor([[ True, False]]))
    """
    ratio = (policy_log_probs - behaviour_log_probs).exp()
    advantages = advantages[:, None]
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_lower, 1 + clip_upper) * advantages
    return -torch.minimum(free, bounded), bounded < free


def token_weights(
    completion_mask: Tensor, reduction: Reduction, *, num_tokens: Tensor, num_sequences: Tensor, constant: float
) -> Tensor:
    """Weights [rows, T] that turn a per-token loss into the batch's: `loss = (weights * token_loss).sum()`.

    `token_mean`: 1 / tokens of the batch. `sequence_mean`: mean over tokens of each completion, then over completions.
    `constant`: 1 / (completions * constant), so that no length normalises a gradient (Dr. GRPO, Liu et al. 2025);
    with constant 1 it is the textbook policy gradient. `num_tokens` and `num_sequences` count the completions of the
    whole batch, whatever the split. Any other reduction is a ValueError.

    >>> counts = dict(num_tokens=torch.tensor(3), num_sequences=torch.tensor(2), constant=8)
    >>> token_weights(torch.tensor([[True, True], [True, False]]), "sequence_mean", **counts)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    mask = completion_mask.float()
    if reduction == "token_mean":
        return mask / num_tokens.clamp(min=1)
    if reduction == "sequence_mean":
        return mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * num_sequences.clamp(min=1))
    if reduction == "constant":
        return mask / (num_sequences.clamp(min=1) * constant)
    raise ValueError(f"reduction must be token_mean, sequence_mean or constant, got {reduction!r}.")


ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

MAX_LOG_RATIO = 20.0
"""Importance ratios above `exp(20)` count as this much, so that a cap of infinity gives finite weights."""


def importance_weights(
    trainer_log_probs: Tensor,
    rollout_log_probs: Tensor,
    completion_mask: Tensor,
    mode: ImportanceMode = "token_truncate",
    *,
    lower: float = 0.0,
    upper: float,
) -> tuple[Tensor, Tensor]:
    """Importance weights without gradient, which correct for an engine whose probabilities differ from the trainer's.

    The ratio `r = pi_trainer / pi_engine` is that of each token, or, for the `sequence` modes, of the whole completion:
    the product over its tokens. `truncate` limits it to `[lower, upper]` (Ionides 2008), `mask` keeps it inside
    the bounds and puts 0 in the place of what lies outside. Nothing is renormalised: what is masked still counts in
    the denominators of the loss.

    Args: log-probs and mask are [rows, T], of whole completions.

    Returns: (weights, outside bool: where the ratio is beyond a bound), both [rows, T], or [rows, 1] for `sequence`

    >>> trainer, engine = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
    >>> importance_weights(trainer, engine, torch.ones(1, 2, dtype=torch.bool), upper=2)
    (tensor([[1., 2.]]), tensor([[False,  True]]))
    >>> importance_weights(trainer, engine, torch.ones(1, 2, dtype=torch.bool), "sequence_mask", upper=2)
    (tensor([[0.]]), tensor([[True]]))
    """
    log_ratio = (trainer_log_probs - rollout_log_probs).detach().masked_fill(~completion_mask, 0.0)
    level, constraint = mode.split("_")
    if level == "sequence":  # in float64: the order of the sum, and with it the padding, decides nothing
        log_ratio = log_ratio.double().sum(dim=1, keepdim=True)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp().to(trainer_log_probs.dtype)
    outside = (ratio < lower) | (ratio > upper)
    return ratio.masked_fill(outside, 0.0) if constraint == "mask" else ratio.clamp(lower, upper), outside


KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate in nats of `KL(policy || reference)` at tokens sampled from the policy (Schulman 2020).

    With the log-ratio `d = log pi - log ref`: k1 = d (unbiased, noisy, negative at times), k2 = d^2/2 (biased, low
    noise), k3 = exp(-d) - 1 + d (unbiased, never negative). `d` above 20 in size is clamped in k3's exponential.

    >>> kl_estimate(torch.tensor([0.0, -1.0]))
    tensor([0.0000, 0.7183])
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return (-log_ratio).clamp(max=20.0).exp() - 1 + log_ratio
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator!r}.")


def kl_penalty(policy_log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """`kl_estimate` as a differentiable loss term.

    k2 and k3 are differentiated as they are: k2's gradient `d * grad log pi` is the unbiased gradient of the per-token
    KL, k3's is the field's usual one (that of the forward KL in expectation). The gradient of k1 has mean zero and
    would penalise nothing, so k1 keeps its value and takes k2's gradient.

    >>> kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]), "k1")
    tensor([ 0., -1.])
    """
    log_ratio = policy_log_probs - ref_log_probs
    if estimator == "k1":
        k2 = kl_estimate(log_ratio, "k2")
        return kl_estimate(log_ratio, "k1").detach() + k2 - k2.detach()
    return kl_estimate(log_ratio, estimator)
