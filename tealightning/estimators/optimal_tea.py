"""The least noisy of the exactly unbiased tail-extrapolated gradients."""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tealightning.checks import check_choice, check_not_negative
from tealightning.estimators._constants import constants
from tealightning.estimators._tail import TailEstimator
from tealightning.functional.normal_tail import TailScale
from tealightning.functional.optimal_tail import min_tail, optimal_coefficients, optimal_weights
from tealightning.functional.tail import tail_size
from tealightning.registry import register


@register
class OptimalTEA(TailEstimator):
    """Rank coefficients for the top `k = ceil(alpha m)` rollouts, exactly 0 for the others (and for the k-th):

        A_(j) = a_j e_j + b_j e_j^2 / s,     j < k

    `e_j = R_(j) - R_(k)` is the excess over the k-th reward and `s` a spread of the group. Among all coefficients for
    which this is exactly unbiased for `E[max of N]` under Gaussian rewards, those with the least noise (this project's
    own; see `tealightning.functional.optimal_tail`):

        c = M^-1 E^T (E M^-1 E^T)^-1 (1, scale_weight c_N),     M = V + lam Q

    with `V` the noise in the directions of location and spread, and `Q` that in a direction which the reward does not
    depend on.

    Equal rewards get equal advantages. A tail without spread gets zeros.

    Args:
        target_n: N, the best-of-N budget at deployment.
        alpha: Upper-tail level in (0, 1]; 1 uses the whole group and assumes that all of it is Gaussian.
        scale: What `s` is: `tail_rms`, the root mean square of the excesses; `tail_std`, their standard deviation
            (needs a tail of 5); `group_std`, the standard deviation of the whole group.
        lam: How many directions of parameter space the reward does not depend on count for one that it does. Large for
            a language model; the noise hardly changes beyond 100.
        scale_weight: Share of the spread's pull that is followed: 1 is best-of-N, 0 the mean reward. Below 1 trades
            bias for noise where the spread is hard to move.
    """

    def __init__(
        self,
        *,
        target_n: int = 128,
        alpha: float = 0.25,
        scale: Literal["tail_rms", "tail_std", "group_std"] = "tail_rms",
        lam: float = 100.0,
        scale_weight: float = 1.0,
    ) -> None:
        super().__init__(target_n=target_n, alpha=alpha)
        self.scale: TailScale = check_choice("scale", scale, ("tail_rms", "tail_std", "group_std"))
        self.lam = check_not_negative("lam", lam)
        self.scale_weight = check_not_negative("scale_weight", scale_weight)

    @property
    def min_tail(self) -> int:
        """3, and 5 with `tail_std`: below, the spread of the excesses can be arbitrarily small beside them."""
        return min_tail(self.scale)

    def compute(self, rewards: Tensor) -> Tensor:
        """[P, m] -> [P, m]."""
        m = rewards.shape[1]
        k = tail_size(self.alpha, m)
        coefficients = _coefficients(m, k, self.scale, self.target_n, self.lam, self.scale_weight)
        return optimal_weights(rewards, coefficients, self.scale)


@lru_cache(maxsize=256)
def _coefficients(m: int, k: int, scale: TailScale, target_n: int, lam: float, scale_weight: float) -> Tensor:
    """[2, k-1] float64."""
    return torch.from_numpy(
        optimal_coefficients(constants(m, k, scale), target_n=target_n, lam=lam, scale_weight=scale_weight)
    )
