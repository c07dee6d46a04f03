"""Weighted sum of several rewards."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.registry import did_you_mean, register
from tealightning.rewards.base import Reward, summed_counts
from tealightning.types import Prompt, RewardScores


@register
class WeightedReward(Reward):
    """`total = sum_k weights[k] * rewards[k]`, each component logged under its key, unweighted.

    A component with weight 0 is computed and logged only. An unscorable component (NaN) with another weight makes
    the total unscorable.

    Args:
        rewards: Component by name; the names are the keys in metrics and tables.
        weights: One finite number for each of `rewards`; negative ones are penalties.

    Raises:
        ValueError: if the names do not match, a weight is not finite, or all are 0.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        for key in weights:
            if key not in rewards:
                raise UserError(f"weights has {key!r}, which is none of the rewards.{did_you_mean(key, rewards)}")
        if missing := [key for key in rewards if key not in weights]:
            raise UserError(f"weights lacks {', '.join(missing)}: give every reward one (0 = log it only).")
        for key, weight in weights.items():
            if not math.isfinite(weight):
                raise UserError(f"weights[{key!r}] must be a finite number, got {weight}.")
        if not any(weights.values()):
            raise UserError(f"at least one weight must differ from 0, got weights={weights}.")
        self.rewards = dict(rewards)
        self.weights = dict(weights)

    def check(self) -> None:
        """Check every component."""
        for key, reward in self.rewards.items():
            try:
                reward.check()
            except ValueError as error:
                raise UserError(f"rewards.{key}: {error}") from error

    def setup(self, device: torch.device) -> None:
        """Set every component up."""
        for reward in self.rewards.values():
            reward.setup(device)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """[B] float64 weighted totals."""
        return self(prompts, completions, metadata).total

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """The weighted total and every component unweighted."""
        scores = {key: reward(prompts, completions, metadata) for key, reward in self.rewards.items()}
        components = {key: one.total for key, one in scores.items()}
        total = torch.zeros(len(completions), dtype=torch.float64)
        for key, weight in self.weights.items():
            if weight != 0:  # 0 * NaN would be NaN
                total += weight * components[key]
        counts = {key: summed_counts(one.counts.values()) for key, one in scores.items() if one.counts}
        return RewardScores(total=total, components=components, counts=counts)

    @property
    def problem(self) -> str | None:  # type: ignore[override]
        """Those of its components."""
        problems = [f"{key}: {reward.problem}" for key, reward in self.rewards.items() if reward.problem]
        return "; ".join(problems) or None

    def close(self) -> None:
        """Close every component."""
        for reward in self.rewards.values():
            reward.close()

    def __repr__(self) -> str:
        return f"WeightedReward({', '.join(f'{w:g} * {key}' for key, w in self.weights.items())})"
