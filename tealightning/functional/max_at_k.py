"""Unbiased policy-gradient weights of `E[max of k rewards]`: on policy, off policy, and summed over every k.

k is the size of a subset, 1 <= k <= m. Off policy, rollouts come from mu, and `rho_i = pi(y_i)/mu(y_i)` is the ratio
of whole sequences, [P, m] float64. Over the subsets I of size k,

    C(m,k)^-1 sum_I prod_{i in I} rho_i * max R_I

is unbiased for E_pi[max of k]. Bagirov et al. 2025 (arXiv 2510.23393) expand the products to first order around
rho = 1; here they are exact, by elementary symmetric polynomials, in O(m k) after sorting: built up item by item, as
means over subsets, so that no subset is enumerated, nothing is divided by a ratio, and binomial coefficients never
appear on their own. The products have the variance of importance sampling: sequences that differ much make them useless
before they make them wrong.
"""

import torch
from torch import Tensor

from tealightning.functional.moments import centred, sum_of_others


def subset_shares(m: int, k: int) -> Tensor:
    """Weights of the gaps between order statistics, [m] float64, rising from 0 (1 if k = 1) to k:

        a_l = m * C(l, k-1) / C(m, k),     l = 0..m-1

    Computed downwards from `a_{m-1} = k` by `a_{l-1} = a_l * (l-k+1)/l`: no factorials, so nothing overflows.

    >>> subset_shares(4, 2)
    tensor([0.0000, 0.6667, 1.3333, 2.0000], dtype=torch.float64)
    """
    level = torch.arange(m - 1, 0, -1, dtype=torch.float64)
    ratios = ((level - k + 1) / level).clamp(min=0)
    return torch.cat([torch.tensor([float(k)], dtype=torch.float64), k * ratios.cumprod(0)]).flip(0)


def sum_of_gaps_below(rewards: Tensor, factors: Tensor) -> Tensor:
    """Sum over the gaps below each reward, weighted by `factors` [m-1], lowest gap first:

        A_(i) = sum_{l < i} (R_(l+1) - R_(l)) * f_l

    Equal for tied rewards, shift-invariant, exactly 0 in a constant group.

    >>> sum_of_gaps_below(torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([1.0, 10.0]))
    tensor([[21.,  0.,  1.]])
    """
    ascending, order = rewards.sort(dim=-1)
    below = (ascending.diff(dim=-1) * factors.to(rewards.device)).cumsum(-1)
    below = torch.cat([below.new_zeros(len(below), 1), below], dim=-1)
    return below.gather(-1, order.argsort(dim=-1))


def max_at_k_weights(rewards: Tensor, k: int) -> Tensor:
    """Score-function weights of max@k without a baseline, in O(m log m); `k = 1` gives the rewards themselves:

        A_i = m/C(m,k) * sum over subsets I of size k with i in I of max(R_I)

    Walder and Karkhanis 2025, "Pass@K policy optimization". With ascending order statistics R_(1..m) and `a_l` of
    `subset_shares`, summed over the gaps above i, so that tied rewards get identical weights:

        A_(i) = k R_(i) + sum_{l >= i} (R_(l+1) - R_(l)) * (k - a_{l-1})

    >>> max_at_k_weights(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64), k=2)
    tensor([[4., 4., 6.]], dtype=torch.float64)
    """
    ascending, order = rewards.sort(dim=-1)
    terms = ascending.diff(dim=-1) * (k - subset_shares(rewards.shape[-1], k)[:-1].to(rewards.device))
    above = terms.flip(-1).cumsum(-1).flip(-1)
    above = torch.cat([above, above.new_zeros(len(above), 1)], dim=-1)
    return k * rewards + above.gather(-1, order.argsort(dim=-1))


def max_at_k_loo_weights(rewards: Tensor, k: int) -> Tensor:
    """Score-function weights of max@k with the leave-one-out-minus-one baseline, for m >= 2, in O(m log m):

        A_i = m/C(m,k) * sum over subsets I of size k with i in I of (max R_I - max R_{I without i})

    What rollout i adds to each subset that it is in (Walder and Karkhanis 2025). With `a_l` of `subset_shares` it is a
    sum over the gaps below i (`sum_of_gaps_below`), hence never negative:

        A_(i) = sum_{l < i} (R_(l+1) - R_(l)) * a_l

    `k = 1` has no "without i"; it is the leave-one-out baseline (RLOO), `m/(m-1) * (R_i - mean)`.

    >>> max_at_k_loo_weights(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64), k=2)
    tensor([[0., 1., 5.]], dtype=torch.float64)
    """
    m = rewards.shape[-1]
    if k == 1:
        return centred(rewards) * (m / (m - 1))
    return sum_of_gaps_below(rewards, subset_shares(m, k)[1:])


def max_at_k_gains(rewards: Tensor, k: int) -> Tensor:
    """`max_at_k_weights` minus that of the group's lowest reward: the same once a mean is subtracted, without rounding.

        A_(i) = sum_{l < i} (R_(l+1) - R_(l)) * a_{l-1}

    Exactly 0 at `k = m`, where every rollout is in the only subset.

    >>> max_at_k_gains(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64), k=2)
    tensor([[0., 0., 2.]], dtype=torch.float64)
    """
    return sum_of_gaps_below(rewards, subset_shares(rewards.shape[-1], k)[:-1])


def _check(rewards: Tensor, ratios: Tensor, k: int, smallest_group: int) -> None:
    m = rewards.shape[-1]
    if rewards.ndim != 2 or ratios.shape != rewards.shape:
        raise ValueError(
            f"ratios must have the shape [P, m] of rewards, got {tuple(ratios.shape)} and {tuple(rewards.shape)}."
        )
    if not 1 <= k <= m or m < smallest_group:
        raise ValueError(f"k must be from 1 to the group size, at least {smallest_group} rollouts; got k={k}, m={m}.")
    if not ((ratios >= 0) & torch.isfinite(ratios)).all():
        raise ValueError("ratios must be finite and not negative: exp(policy log-prob - behaviour log-prob).")


def _subset_means(ratios: Tensor, values: Tensor, k: int) -> Tensor:
    """Mean of `v prod rho` over the subsets of size s = 0..k-1 of the items before the i-th: [P, m, k].

    v is the value of the subset's first item; the empty set has mean 1. A subset of size s of i + 1 items has the
    newest with probability `s/(i+1)`.
    """
    size = torch.arange(k, dtype=ratios.dtype, device=ratios.device)
    means = torch.zeros_like(ratios[:, :1]).repeat(1, k)
    means[:, 0] = 1.0
    rows = [means]
    for i in range(ratios.shape[1] - 1):
        ratio, value = ratios[:, i : i + 1], values[:, i : i + 1]
        joined = torch.cat([means[:, :1], value, means[:, 1:-1]], dim=1)[:, :k]
        means = ((i + 1 - size).clamp(min=0) * means + size * ratio * joined) / (i + 1)
        rows.append(means)
    return torch.stack(rows, dim=1)


def _below_shares(m: int, k: int) -> Tensor:
    """Probability that a of k-1 items drawn from the m-1 others lie below the i-th: [m, k], rows i, columns a."""
    below = torch.arange(m, dtype=torch.float64)[:, None]
    drawn = torch.arange(k, dtype=torch.float64)
    above, rest = m - 1 - below, k - 1 - drawn

    def log_binomial(n: Tensor, size: Tensor) -> Tensor:
        return (n + 1).lgamma() - (size + 1).lgamma() - (n - size + 1).clamp(min=1).lgamma()

    possible = (drawn <= below) & (rest <= above)
    whole = log_binomial(torch.tensor(m - 1.0, dtype=torch.float64), torch.tensor(k - 1.0, dtype=torch.float64))
    return (log_binomial(below, drawn) + log_binomial(above, rest) - whole).exp().masked_fill(~possible, 0.0)


def off_policy_max_at_k_weights(rewards: Tensor, ratios: Tensor, k: int) -> Tensor:
    """Off-policy weights of max@k without a baseline, unbiased for the gradient of E_pi[max of k]:

        A_i = m C(m,k)^-1 * sum over subsets I of size k with i in I of prod_{j in I} rho_j * max R_I

    With the rewards ascending, a subset with i is split into its a members below i and those above, which hold the
    maximum; the two sides factorise:

        A_(i) = k rho_i sum_a P(a) * mean_{a of the lower} prod rho * mean_{k-1-a of the upper} (prod rho * max R)

    with P(a) the share of subsets that have a below i, and R_i for the mean over the empty upper side. `k = 1` gives
    `rho_i R_i`. A ValueError if shapes, k or ratios do not fit.

    >>> rewards, ratios = torch.tensor([[[0.0, 1.0, 3.0]], [[1.0, 1.0, 2.0]]], dtype=torch.float64)
    >>> off_policy_max_at_k_weights(rewards, ratios, k=2)
    tensor([[ 7.,  7., 12.]], dtype=torch.float64)
    """
    _check(rewards, ratios, k, 1)
    ascending, order = rewards.sort(dim=-1)
    sorted_ratios = ratios.gather(-1, order)
    lower = _subset_means(sorted_ratios, torch.ones_like(rewards), k)
    # From the top down an item that joins leaves the maximum as it is unless the set was empty.
    upper = _subset_means(sorted_ratios.flip(-1), ascending.flip(-1), k).flip(1)
    upper[:, :, 0] = ascending
    shares = _below_shares(rewards.shape[-1], k).to(rewards.device)
    weights = k * sorted_ratios * (shares * lower * upper.flip(-1)).sum(dim=-1)
    return torch.empty_like(weights).scatter(-1, order, weights)


def off_policy_max_at_k_loo_weights(rewards: Tensor, ratios: Tensor, k: int) -> Tensor:
    """Off-policy weights of max@k with the leave-one-out-minus-one baseline, for m >= 2:

        A_i = m C(m,k)^-1 * sum over I of size k with i in I of prod_{j in I} rho_j * (max R_I - max R_{I without i})

    The baseline carries the ratio of i too: `E_mu[rho_i grad log pi(y_i)] = 0` given the others, so it changes nothing
    in expectation; without that ratio it would be biased. With a_l of `subset_shares`,

        A_(i) = rho_i sum_{l < i} (R_(l+1) - R_(l)) * a_l * (mean of prod rho over k-1 of the l lowest)

    so it is never negative, shift-invariant, and exactly 0 in a constant group. `k = 1` has no "without i"; it is
    `rho_i * (R_i - b_i)` with `b_i = sum_{j != i} rho_j R_j / sum_{j != i} rho_j`: RLOO at rho = 1, unbiased since
    b_i knows the others only (if all their ratios are 0, b_i is their plain mean). ValueError as without a baseline.

    >>> rewards, ratios = torch.tensor([[[0.0, 1.0, 3.0]], [[1.0, 1.0, 2.0]]], dtype=torch.float64)
    >>> off_policy_max_at_k_loo_weights(rewards, ratios, k=2)
    tensor([[ 0.,  1., 10.]], dtype=torch.float64)
    """
    _check(rewards, ratios, k, 2)
    m = rewards.shape[-1]
    if k == 1:
        from_max = rewards - rewards.amax(dim=-1, keepdim=True)
        no_weight = sum_of_others(ratios) == 0
        total = torch.where(no_weight, m - 1.0, sum_of_others(ratios))
        weighted = torch.where(no_weight, sum_of_others(from_max), sum_of_others(ratios * from_max))
        return ratios * (from_max - weighted / total)
    ascending, order = rewards.sort(dim=-1)
    sorted_ratios = ratios.gather(-1, order)
    means = _subset_means(sorted_ratios, torch.ones_like(rewards), k)[:, 1:, -1]
    gains = (ascending.diff(dim=-1) * subset_shares(m, k)[1:].to(rewards.device) * means).cumsum(dim=-1)
    weights = sorted_ratios * torch.cat([torch.zeros_like(gains[:, :1]), gains], dim=-1)
    return torch.empty_like(weights).scatter(-1, order, weights)


def log_survival_weights(rewards: Tensor) -> Tensor:
    """Centred weights of the integral of the log survival probability, in O(m log m):

        A = w - mean(w),     w_(i) = m sum_{j <= i} (R_(j) - R_(j-1))/(m - j + 1),     R_(0) = 0

    The step of height `R_(j) - R_(j-1)` is shared by the `m - j + 1` rollouts that reach it, as `grad log P = grad P/P`
    wants. The first step is a constant and `mean(w) = R_(m)`, so that only the gaps count. With the max@k weights

        w_i = R_i + sum_{k=2}^{m} (1/k) max_at_k_loo_weights(R, k)_i

    which follows `sum_{k=1}^{m} (1/k) E[max of k]` without bias. Subtracting `mean(w)`, the largest reward, takes
    `E[R_(m) (1/m) sum_i S_i] = (1/m) grad E[max of m]` away: A is unbiased for the sum up to m - 1.

    >>> log_survival_weights(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64))
    tensor([[-3.0000, -1.5000,  4.5000]], dtype=torch.float64)
    """
    m = rewards.shape[-1]
    return centred(sum_of_gaps_below(rewards, m / torch.arange(m - 1, 0, -1, dtype=torch.float64)))
