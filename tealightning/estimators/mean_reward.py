"""The mean-reward objective: REINFORCE, with the group's mean as baseline, or leave-one-out (RLOO)."""

from typing import Literal

from torch import Tensor

from tealightning.checks import check_choice
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class MeanReward(AdvantageEstimator):
    """Ascend the mean reward: `A_i = R_i - b_i`.

    - `baseline="mean"`: `R_i - mean(R)`, the advantage of GRPO without the division; `(m-1)/m` of the gradient.
    - `baseline="loo"`: `m/(m-1) * (R_i - mean(R))`, that is `R_i` minus the mean of the others (RLOO, Kool, van Hoof
      and Welling 2019; Ahmadian et al. 2024); unbiased.
    - `baseline="none"`: `R_i` (REINFORCE, Williams 1992); unbiased, noisy. A constant group gets that constant.

    Args:
        baseline: Baseline that is subtracted from the rewards.
    """

    objective = "E[R]"

    def __init__(self, *, baseline: Literal["mean", "none", "loo"] = "mean") -> None:
        self.baseline = check_choice("baseline", baseline, ("mean", "none", "loo"))

    @property
    def min_group_size(self) -> int:
        return 1 if self.baseline == "none" else 2  # a baseline needs another rollout to compare with

    def compute(self, rewards: Tensor) -> Tensor:
        if self.baseline == "none":
            return rewards.clone()
        m = rewards.shape[1]
        return centred(rewards) * (m / (m - 1) if self.baseline == "loo" else 1.0)
