"""Settings of the policy-gradient loss and its value on a micro-batch."""

import warnings
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tealightning.checks import check_choice, check_not_negative, check_positive, check_share
from tealightning.errors import UserError
from tealightning.functional.losses import (
    KLEstimator,
    Reduction,
    clipped_policy_loss,
    kl_estimate,
    kl_penalty,
    token_weights,
    truncated_importance_weights,
)
from tealightning.types import CompletionScores, StepBatch


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
        check_share("loss.clip_lower", self.clip_lower)
        if not self.clip_upper > 0:
            raise UserError(f"loss.clip_upper must be above 0, got {self.clip_upper}.")
        check_not_negative("loss.kl_coef", self.kl_coef)
        check_choice("loss.reduction", self.reduction, get_args(Reduction))
        check_choice("loss.kl_estimator", self.kl_estimator, get_args(KLEstimator))
        if self.constant is not None:
            check_positive("loss.constant", self.constant)
            if self.reduction != "constant":
                warnings.warn(f"loss.constant has no effect with reduction={self.reduction!r}.", stacklevel=3)
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"loss.importance_cap must be above 0, got {self.importance_cap}.")


def micro_batch_loss(
    settings: PolicyGradientLoss, step: StepBatch, chosen: Tensor, scores: CompletionScores
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the batch loss, and what the metrics need of it.

    Args:
        chosen: [rows] int64, the micro-batch's rollouts.
        scores: Of these rollouts, with gradient; with entropies on the first pass over a batch.

    Returns:
        (scalar loss with gradient, {name: sum over tokens, or maximum for names that end in `_max`})
    """
    policy_log_probs, mask = scores.log_probs, scores.mask
    here = (chosen, slice(mask.shape[1]))
    rollout_log_probs = step.rollouts.rollout_log_probs[here]
    behaviour = policy_log_probs.detach() if step.behaviour_log_probs is None else step.behaviour_log_probs[here]
    token_loss, clipped = clipped_policy_loss(
        policy_log_probs,
        behaviour,
        step.advantages[chosen].to(policy_log_probs.dtype),
        clip_lower=settings.clip_lower,
        clip_upper=settings.clip_upper,
    )
    if settings.importance_cap is not None:
        token_loss = token_loss * truncated_importance_weights(behaviour, rollout_log_probs, settings.importance_cap)
    weights = token_weights(
        mask,
        settings.reduction,
        num_tokens=step.num_tokens,
        num_sequences=step.num_sequences,
        constant=float(settings.constant or step.rollouts.sampling.max_new_tokens),
    )
    loss = (weights * token_loss).sum()
    sums = {"policy_loss": loss.detach(), "clipped": (clipped & mask).sum(), "tokens": mask.sum()}
    if scores.entropy is not None:
        mismatch = (policy_log_probs.detach() - rollout_log_probs).abs().masked_fill(~mask, 0.0)
        sums |= {"entropy": scores.entropy.sum(), "mismatch": mismatch.sum(), "mismatch_max": mismatch.max()}
    if step.ref_log_probs is not None:
        ref_log_probs = step.ref_log_probs[here]
        penalty = kl_penalty(policy_log_probs, ref_log_probs, settings.kl_estimator)
        loss = loss + settings.kl_coef * (weights * penalty).sum()
        kl = kl_estimate(policy_log_probs.detach() - ref_log_probs, settings.kl_estimator)
        sums["kl"] = (kl * mask).sum()
    return loss, sums


def merge_sums(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add a micro-batch's sums to the step's, in place; maxima stay maxima."""
    for key, value in part.items():
        value = value.float()
        if key in total:
            value = torch.maximum(total[key], value) if key.endswith("_max") else total[key] + value
        total[key] = value
