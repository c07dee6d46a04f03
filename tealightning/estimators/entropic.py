"""Exponentially tilted advantages whose tilt adapts to each group."""

import math
import warnings

from torch import Tensor

from tealightning.checks import check_positive
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.entropic import entropic_weights, leave_one_out_tilt
from tealightning.registry import register


@register
class Entropic(AdvantageEstimator):
    """Leave-one-out exponential tilt (TTT-Discover, Yuksekgonul et al. 2026, arXiv 2601.16175):

        A_i = exp(beta R_i) / mean_{j != i} exp(beta R_j) - 1

    The gradient of `log E[exp(beta R)]` with its denominator estimated from the other rollouts, hence biased at finite
    m. By default beta is chosen for each group such that softmax(beta R) is `kl_target` nats away from uniform: shift-
    and scale-invariant, but no fixed objective is ascended. A constant group gets zeros.

    Deviations: beta has no bound in units of reward; a target that ties at the top put out of reach takes the limit
    beta -> infinity (`functional.entropic`); groups with `ln m <= kl_target` are refused; no eps in the denominator.

    Args:
        kl_target: Divergence from uniform in nats, > 0 and below the log of the group size.
        beta: A fixed tilt instead, > 0, in units of 1/reward: shift-invariant only, and its weights are capped at e^80,
            which they reach where a winner leads by about 80/beta.
    """

    objective = "log E[exp(beta R)] (biased)"

    def __init__(self, *, kl_target: float = math.log(2), beta: float | None = None) -> None:
        self.kl_target = check_positive("kl_target", kl_target)
        self.beta = None if beta is None else check_positive("beta", beta)
        if beta is not None and kl_target != math.log(2):
            warnings.warn(f"{self.name}: kl_target={kl_target} has no effect with a fixed beta.", stacklevel=2)

    @property
    def min_group_size(self) -> int:
        if self.beta is not None:
            return 2
        m = max(2, math.floor(math.exp(min(self.kl_target, 700.0))))
        while math.log(m) <= self.kl_target + 1e-9:
            m += 1
        return m

    @property
    def group_size_advice(self) -> str:
        if self.beta is not None:
            return super().group_size_advice
        return (
            f"kl_target (now {self.kl_target:.4g}) must be below ln(group_size); raise group_size to "
            f"{self.min_group_size} or more, or lower kl_target."
        )

    def compute(self, rewards: Tensor) -> Tensor:
        if self.beta is None:
            return entropic_weights(rewards, self.kl_target)
        return leave_one_out_tilt(self.beta * (rewards - rewards.amax(dim=1, keepdim=True)))
