"""The literature's simple baseline for best-of-n training."""

from torch import Tensor

from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class BonMaxMean(AdvantageEstimator):
    """Reinforce only the winners, by their lead over the mean:

        A_i = (R_i - mean(R)) 1{R_i = max R}

    Biased: the mean is no valid baseline for the maximum. A constant group gets zeros (everyone wins, by nothing).
    """

    objective = "E[max of m] (biased)"
    min_group_size = 2  # a single rollout beats nobody

    def compute(self, rewards: Tensor) -> Tensor:
        return centred(rewards).masked_fill(rewards < rewards.amax(dim=1, keepdim=True), 0.0)
