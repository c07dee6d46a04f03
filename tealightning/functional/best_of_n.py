"""Unbiased best-of-n: `E[max of n]` from M >= n samples."""

from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_n_weights(counts: Tensor, width: int, n: int) -> Tensor:
    """Weights of the order statistics, best first: `w_t = C(M-1-t, n-1) / C(M, n)` for rank t = 0..M-1.

    `w_0 = n/M` and `w_{t+1} = w_t * (M-t-n)/(M-t-1)`: no factorials, so M of many thousands is safe.

    Args:
        counts: [P] int64, the M of each prompt.
        width: Number of ranks to return; ranks from M on weigh 0.
        n: Subset size, >= 1.

    Returns:
        [P, width] float64; rows sum to 1 where n <= M and mean nothing elsewhere.
    """
    samples = counts.double()[:, None]
    rank = torch.arange(width - 1, dtype=torch.float64, device=counts.device)
    ratios = ((samples - rank - n) / (samples - rank - 1).clamp(min=1)).clamp(min=0)
    return torch.cat([n / samples.clamp(min=1), n / samples.clamp(min=1) * ratios.cumprod(-1)], dim=-1)


def best_of_n(rewards: Tensor, ns: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Unbiased estimate of `E[max of n]` for each prompt: the mean of the maximum over all subsets of size n.

        sum_{j >= n} C(j-1, n-1)/C(M, n) * R_(j),     R_(1) <= ... <= R_(M)

    For 0/1 rewards it is pass@n (Chen et al. 2021). A bootstrap, which draws with replacement, would be biased low.

    Args:
        rewards: [P, M] float, M >= 1.
        ns: Subset sizes.
        valid: [P, M] bool, False = not a sample; None = all. Prompts may have different numbers of samples.

    Returns:
        [P, len(ns)] float64; NaN where a prompt has fewer than n valid samples.
    """
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    counts = valid.sum(dim=1)
    descending = rewards.double().masked_fill(~valid, float("-inf")).sort(dim=1, descending=True).values
    best = descending[:, :1].masked_fill(counts[:, None] == 0, 0.0)
    used = torch.arange(rewards.shape[1], device=rewards.device) < counts[:, None]
    below_best = (descending - best).masked_fill(~used, 0.0)  # differences keep digits, and constants exact
    columns = []
    for n in ns:
        estimate = best[:, 0] + (best_of_n_weights(counts, rewards.shape[1], n) * below_best).sum(dim=1)
        columns.append(estimate.masked_fill(counts < n, float("nan")))
    return torch.stack(columns, dim=1)
