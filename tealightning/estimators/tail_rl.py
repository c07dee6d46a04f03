"""The integral of the log of the probability to exceed each threshold."""

from torch import Tensor

from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.max_at_k import log_survival_weights
from tealightning.registry import register


@register
class TailRL(AdvantageEstimator):
    """Weights of the log probability to exceed each threshold, centred (TailRL, arXiv 2609.02987, 2026):

        A = w - mean(w),     w_(i) = m sum_{j <= i} (R_(j) - R_(j-1))/(m - j + 1)

    Ascends the integral of `log P(R > t)` over t, whose gradient is `sum_k (1/k) grad E[max of k]`, k = 1, 2, ...; with
    m rollouts it is unbiased for the sum up to m - 1 (`functional.max_at_k.log_survival_weights`). No deployment budget
    enters. On 0/1 rewards it is MaxRL without its eps. Equal rewards get equal advantages, a constant group zeros.
    """

    objective = "sum over k < m of E[max of k]/k"
    min_group_size = 2  # there are gaps between rewards or there is nothing

    def compute(self, rewards: Tensor) -> Tensor:
        return log_survival_weights(rewards)
