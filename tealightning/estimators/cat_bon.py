"""Standardised rewards, weighted by how much likelier a rank is among the best of N."""

from torch import Tensor

from tealightning.checks import check_integer
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional import moments
from tealightning.registry import register


@register
class CatBon(AdvantageEstimator):
    """Standardised rewards times best-of-N rank weights with mean 1 over the group:

        A_i = z_i w_i,     w_i ~ N q_i^(N-1)

    `q` is the mid-rank quantile and `N q^(N-1)` the density ratio of the best of N to a single draw (Ousherovitch and
    Tewari 2026, compute aligned training, arXiv 2604.24957). Biased, whatever m: the weight of a reward r in the
    gradient of `E[max of N]` is `N * integral up to r of F^(N-1)`, not `N F(r)^(N-1) r`. A constant group gets zeros.

    Deviations: mid-ranks, so that ties share; the weights' mean is the group's, not the batch's; no clip of z, no eps.

    Args:
        target_n: N, the best-of-N budget at deployment; 1 gives standardised rewards.
    """

    objective = "E[max of N] (biased)"
    min_group_size = 2  # one rollout has no spread

    def __init__(self, *, target_n: int = 128) -> None:
        self.target_n = check_integer("target_n", target_n, 1)

    def compute(self, rewards: Tensor) -> Tensor:
        standardised = moments.ratio_or_zero(moments.centred(rewards), moments.sample_std(rewards))
        return standardised * moments.best_of_n_rank_weights(moments.mid_rank_quantiles(rewards), self.target_n)
