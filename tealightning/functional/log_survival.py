"""Policy-gradient weights of the integral of `log P(R > t)`: every size of a best-of-k at once."""

import torch
from torch import Tensor

from tealightning.functional.max_at_k import sum_of_gaps_below
from tealightning.functional.moments import centred


def log_survival_weights(rewards: Tensor) -> Tensor:
    """`A = w - mean(w)` with `w_(i) = m sum_{j <= i} (R_(j) - R_(j-1))/(m - j + 1)`, `R_(0) = 0`, in O(m log m).

    The step of height `R_(j) - R_(j-1)` is shared by the `m - j + 1` rollouts that reach it, as `grad log P = grad P/P`
    wants. The first step is a constant and `mean(w) = R_(m)`, so that only the gaps count: shift-invariant, equal for
    tied rewards, exactly 0 in a constant group. With the max@k weights of `tealightning.functional.max_at_k`

        w_i = R_i + sum_{k=2}^{m} (1/k) max_at_k_loo_weights(R, k)_i

    which follows `sum_{k=1}^{m} (1/k) E[max of k]` without bias. Subtracting `mean(w)`, the largest reward, takes
    `E[R_(m) (1/m) sum_i S_i] = (1/m) grad E[max of m]` away: A is unbiased for the sum up to m - 1.

    Args:
        rewards: [P, m] float64, finite.

    Returns:
        [P, m] float64.
    """
    m = rewards.shape[-1]
    return centred(sum_of_gaps_below(rewards, m / torch.arange(m - 1, 0, -1, dtype=torch.float64)))
