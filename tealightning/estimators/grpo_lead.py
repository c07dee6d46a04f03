"""GRPO with hard prompts counting more than easy ones."""

import torch
from torch import Tensor

from tealightning.checks import check_finite, check_positive
from tealightning.errors import UserError
from tealightning.estimators.grpo import GRPO
from tealightning.registry import register


@register
class GRPOLead(GRPO):
    """GRPO's advantage times `w(share)` if positive, `w(1 - share)` if negative (GRPO-LEAD, Zhang and Zuo 2025).

        w(x) = low + (high - low) / (1 + exp(steepness (x - midpoint)))

    `share` is the share of the group whose reward exceeds `threshold` (arXiv 2504.09696): successes on hard prompts and
    failures on easy ones count most. Follows no objective without bias; neither shift- nor scale-equivariant. A
    constant group gets zeros. Deviation: only the difficulty part of the paper; the others belong to the reward.

    Args:
        threshold: Rewards above it are successes.
        low: Weight of the easiest, >= 0.
        high: Weight of the hardest, >= low.
        steepness: How fast the weight falls with the share, > 0.
        midpoint: Share at which it is half way.
    """

    objective = "E[R] (standardised, hard prompts first)"

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        low: float = 0.4,
        high: float = 1.5,
        steepness: float = 10.0,
        midpoint: float = 0.75,
        eps: float = 1e-4,
    ) -> None:
        self.threshold = check_finite("threshold", threshold)
        self.low = check_finite("low", low)
        self.high = check_finite("high", high)
        self.steepness = check_positive("steepness", steepness)
        self.midpoint = check_finite("midpoint", midpoint)
        super().__init__(eps=eps)
        if low < 0:
            raise UserError(f"low must be at least 0 (a negative weight would punish successes), got {low!r}.")
        if high < low:
            raise UserError(f"high must be at least low={low}, got {high!r}.")

    def compute(self, rewards: Tensor) -> Tensor:
        share = (rewards > self.threshold).double().mean(dim=1, keepdim=True)
        standardised = super().compute(rewards)
        success, failure = (
            self.low + (self.high - self.low) * torch.sigmoid(-self.steepness * (part - self.midpoint))
            for part in (share, 1 - share)
        )
        return standardised * torch.where(standardised > 0, success, failure)
