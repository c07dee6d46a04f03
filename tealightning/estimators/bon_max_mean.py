"""The literature's simple baseline for best-of-n training: reinforce only the winner."""

from typing import ClassVar

from torch import Tensor

from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class BonMaxMean(AdvantageEstimator):
    """`A_i = R_i - mean(R)` for every rollout that attains the group's maximum, else 0.

    Biased: the mean is no valid baseline for the maximum. A constant group gets zeros (everyone wins, by nothing).
    """

    objective: ClassVar[str] = "E[max of m] (biased)"

    def __init__(self) -> None:
        pass

    @property
    def min_group_size(self) -> int:
        """2: a single rollout beats nobody."""
        return 2

    def compute(self, rewards: Tensor) -> Tensor:
        """[P, m] -> [P, m]."""
        return centred(rewards).masked_fill(rewards < rewards.amax(dim=1, keepdim=True), 0.0)
