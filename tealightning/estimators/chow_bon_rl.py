"""REINFORCE on the whole group: every rollout is paid the best reward of all."""

from typing import Literal

import torch
from torch import Tensor

from tealightning.checks import check_choice
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class ChowBonRL(AdvantageEstimator):
    """REINFORCE on the set of rollouts: one action with reward `max R`, the same advantage for all of them:

        A_i = m (max R - b)

    - `baseline="none"`: `b = 0`, unbiased for `E[max of m]`. A constant group gets m times its constant.
    - `baseline="mean"`: `b = mean(R)`. Since `E[mean(R) sum_i S_i] = grad E[R]`, what it ascends, without bias, is
      `E[max of m] - E[R]`: as a gradient of `E[max of m]` it is biased. A constant group gets zeros.

    The objective is that of BoN-RL (Chow et al. 2024, arXiv 2412.15287), the method is another one: they differentiate
    (an approximation of) the best-of-N distribution and sample from it. `PassAtN` is the nearest to their BoN-RLB.

    Args:
        baseline: Baseline that is subtracted from the maximum.
    """

    objective = "E[max of m] - E[R]"

    def __init__(self, *, baseline: Literal["mean", "none"] = "mean") -> None:
        self.baseline = check_choice("baseline", baseline, ("mean", "none"))

    @property
    def min_group_size(self) -> int:
        return 1 if self.baseline == "none" else 2  # a single rollout never exceeds its own mean

    def compute(self, rewards: Tensor) -> Tensor:
        paid = rewards if self.baseline == "none" else centred(rewards)
        return rewards.shape[1] * torch.ones_like(rewards) * paid.amax(dim=1, keepdim=True)
