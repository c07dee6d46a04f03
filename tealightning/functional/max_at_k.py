"""Unbiased policy-gradient weights of `E[max of k rewards]` from m >= k rollouts."""

import torch
from torch import Tensor

from tealightning.functional.moments import centred


def subset_shares(m: int, k: int) -> Tensor:
    """`a_l = m * C(l, k-1) / C(m, k)` for l = 0..m-1: [m] float64, rising from 0 (1 if k = 1) to k.

    Computed downwards from `a_{m-1} = k` by `a_{l-1} = a_l * (l-k+1)/l`: no factorials, so nothing overflows.
    """
    level = torch.arange(m - 1, 0, -1, dtype=torch.float64)
    ratios = ((level - k + 1) / level).clamp(min=0)
    return torch.cat([torch.tensor([float(k)], dtype=torch.float64), k * ratios.cumprod(0)]).flip(0)


def gaps_and_ranks(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Gaps between neighbouring order statistics, ascending [P, m-1], and the rank of every reward [P, m]."""
    ascending, order = rewards.sort(dim=-1)
    return ascending.diff(dim=-1), order.argsort(dim=-1)


def sum_of_gaps_below(rewards: Tensor, factors: Tensor) -> Tensor:
    """`sum_{l < i} (R_(l+1) - R_(l)) * f_l` with factors [m-1]: [P, m] in the order of the rewards."""
    gaps, rank = gaps_and_ranks(rewards)
    below = (gaps * factors.to(rewards.device)).cumsum(-1)
    below = torch.cat([below.new_zeros(len(below), 1), below], dim=-1)
    return below.gather(-1, rank)


def max_at_k_weights(rewards: Tensor, k: int) -> Tensor:
    """`A_i = m/C(m,k) * sum over subsets I of size k with i in I of max(R_I)`, in O(m log m).

    Plain score-function weights of max@k (Walder and Karkhanis 2025, "Pass@K policy optimization"). With ascending
    order statistics R_(1..m) and `a_l` of `subset_shares`, summed over the gaps above i instead of over subsets:

        A_(i) = k R_(i) + sum_{l >= i} (R_(l+1) - R_(l)) * (k - a_{l-1})

    so that tied rewards get identical weights.

    Args:
        rewards: [P, m] float64, finite.
        k: Subset size, 1 <= k <= m. `k = 1` gives the rewards themselves.

    Returns:
        [P, m] float64.
    """
    gaps, rank = gaps_and_ranks(rewards)
    terms = gaps * (k - subset_shares(rewards.shape[-1], k)[:-1].to(rewards.device))
    above = terms.flip(-1).cumsum(-1).flip(-1)
    above = torch.cat([above, above.new_zeros(len(above), 1)], dim=-1)
    return k * rewards + above.gather(-1, rank)


def max_at_k_loo_weights(rewards: Tensor, k: int) -> Tensor:
    """`A_i = m/C(m,k) * sum over subsets I of size k with i in I of (max R_I - max R_{I without i})`, in O(m log m).

    The leave-one-out-minus-one baseline of max@k (Walder and Karkhanis 2025): what rollout i adds to each subset that
    it is in. With `a_l` of `subset_shares` it is a sum over the gaps below i, hence never negative, equal for tied
    rewards, shift-invariant and exactly 0 in a constant group:

        A_(i) = sum_{l < i} (R_(l+1) - R_(l)) * a_l

    `k = 1` has no "without i"; it is the leave-one-out baseline (RLOO), `m/(m-1) * (R_i - mean)`.

    Args:
        rewards: [P, m] float64, finite, m >= 2.
        k: Subset size, 1 <= k <= m.

    Returns:
        [P, m] float64.
    """
    m = rewards.shape[-1]
    if k == 1:
        return centred(rewards) * (m / (m - 1))
    return sum_of_gaps_below(rewards, subset_shares(m, k)[1:])


def max_at_k_gains(rewards: Tensor, k: int) -> Tensor:
    """`max_at_k_weights` minus that of the group's lowest reward: the same once a mean is subtracted, without rounding.

        A_(i) = sum_{l < i} (R_(l+1) - R_(l)) * a_{l-1}

    Exactly 0 at `k = m`, where every rollout is in the only subset.

    Args:
        rewards: [P, m] float64, finite.
        k: Subset size, 1 <= k <= m.

    Returns:
        [P, m] float64.
    """
    return sum_of_gaps_below(rewards, subset_shares(rewards.shape[-1], k)[:-1])
