"""Rewards replaced by their win rate, bent towards the top."""

from torch import Tensor

from tealightning.checks import check_positive
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred, exponential_tilt, win_rates
from tealightning.registry import register


@register
class Infalign(AdvantageEstimator):
    """Exponentially tilted win rate q against the rest of the group, centred:

        A_i = T_i - mean(T),     T = (exp(t q) - 1)/(exp(t) - 1)

    Calibrate and transform (InfAlign-CTRL, Balashankar et al. 2024, arXiv 2412.19792): a reward counts as the share of
    answers that it beats, and for best-of-N that share is tilted exponentially. Only the order of the rewards matters.
    Biased: q depends on the policy, and the group's mean on the rollout itself. A constant group gets zeros.

    Deviations: the other rollouts of the group stand in for the paper's fixed reference policy, so that q is 1/2 on
    average and no group fades out once it beats the reference; the transform is scaled to [0, 1].

    Args:
        tilt: t > 0; near 0 the plain win rate.
    """

    objective = "E[tilted win rate] (biased)"
    min_group_size = 2  # a win rate needs an opponent

    def __init__(self, *, tilt: float = 10.0) -> None:
        self.tilt = check_positive("tilt", tilt)

    def compute(self, rewards: Tensor) -> Tensor:
        return centred(exponential_tilt(win_rates(rewards), self.tilt))
