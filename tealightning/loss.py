"""Settings of the policy-gradient loss and its value on a micro-batch."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tealightning.functional.kl import KLEstimator, kl_estimate, kl_penalty
from tealightning.functional.losses import (
    Reduction,
    clipped_policy_loss,
    token_weights,
    truncated_importance_weights,
)
from tealightning.micro_batches import CompletionScores


@dataclass(kw_only=True, slots=True)
class PolicyGradientLoss:
    """The clipped policy-gradient loss with an optional KL penalty.

    Args:
        clip_lower: The ratio to the behaviour policy is clipped at 1 - clip_lower. With one inner epoch the ratio is 1
            and nothing is clipped.
        clip_upper: ... and at 1 + clip_upper.
        reduction: `token_mean`, `sequence_mean` or `constant` (see `functional.losses.token_weights`).
        constant: Tokens that `constant` divides by; None = sampling.max_new_tokens (Dr. GRPO), 1 = textbook sum.
        kl_coef: Weight of the KL penalty to the frozen reference; 0 loads no reference model.
        kl_estimator: `k1`, `k2` or `k3` (see `functional.kl`).
        importance_cap: Cap of the truncated importance weights that correct engine/trainer log-prob mismatch;
            None = no correction.
    """

    clip_lower: float = 0.2
    clip_upper: float = 0.2
    reduction: Reduction = "token_mean"
    constant: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip_lower <= 1:
            raise ValueError(f"loss.clip_lower must be in (0, 1], got {self.clip_lower}.")
        if not self.clip_upper > 0:
            raise ValueError(f"loss.clip_upper must be above 0, got {self.clip_upper}.")
        if self.kl_coef < 0:
            raise ValueError(f"loss.kl_coef must be 0 or more, got {self.kl_coef}.")
        if self.reduction not in ("token_mean", "sequence_mean", "constant"):
            raise ValueError(f"loss.reduction must be token_mean, sequence_mean or constant, got {self.reduction!r}.")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"loss.kl_estimator must be k1, k2 or k3, got {self.kl_estimator!r}.")
        if self.constant is not None and not self.constant > 0:
            raise ValueError(f"loss.constant must be above 0, got {self.constant}.")
        if self.constant is not None and self.reduction != "constant":
            warnings.warn(f"loss.constant has no effect with reduction={self.reduction!r}.", stacklevel=3)
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"loss.importance_cap must be above 0, got {self.importance_cap}.")


@dataclass(kw_only=True, slots=True)
class Denominators:
    """Sizes of the whole batch (mean over ranks), so that no split of it changes the loss."""

    num_tokens: Tensor  # scalar, completion tokens of scored rollouts
    num_sequences: Tensor  # scalar, scored rollouts
    constant: float


def micro_batch_loss(
    settings: PolicyGradientLoss,
    scores: CompletionScores,
    *,
    advantages: Tensor,
    behaviour_log_probs: Tensor | None,
    rollout_log_probs: Tensor,
    ref_log_probs: Tensor | None,
    denominators: Denominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the batch loss, and sums over its tokens for the metrics.

    Args:
        advantages: [rows] float.
        behaviour_log_probs: [rows, t] of the policy at the start of the step; None = the policy itself (ratio 1).
        rollout_log_probs: [rows, t] of the engine.
        ref_log_probs: [rows, t] of the reference; None without a KL penalty.

    Returns:
        (scalar loss with gradient, {name: scalar sum over tokens})
    """
    policy_log_probs, mask = scores.log_probs, scores.mask
    behaviour = policy_log_probs.detach() if behaviour_log_probs is None else behaviour_log_probs
    token_loss, clipped = clipped_policy_loss(
        policy_log_probs,
        behaviour,
        advantages.to(policy_log_probs.dtype),
        clip_lower=settings.clip_lower,
        clip_upper=settings.clip_upper,
    )
    if settings.importance_cap is not None:
        token_loss = token_loss * truncated_importance_weights(behaviour, rollout_log_probs, settings.importance_cap)
    weights = token_weights(
        mask,
        settings.reduction,
        num_tokens=denominators.num_tokens,
        num_sequences=denominators.num_sequences,
        constant=denominators.constant,
    )
    policy_loss = (weights * token_loss).sum()
    sums = {
        "policy_loss": policy_loss.detach(),
        "clipped": (clipped & mask).sum(),
        "tokens": mask.sum(),
    }
    if scores.entropy is not None:
        sums["entropy"] = scores.entropy.sum()
    if ref_log_probs is None:
        return policy_loss, sums
    penalty = kl_penalty(policy_log_probs, ref_log_probs, settings.kl_estimator)
    with torch.no_grad():
        sums["kl"] = (kl_estimate(policy_log_probs, ref_log_probs, settings.kl_estimator) * mask).sum()
    return policy_loss + settings.kl_coef * (weights * penalty).sum(), sums
