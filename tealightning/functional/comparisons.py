"""Compare two policies: win rates of best-of-n, probability of improvement, corrected p-values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tealightning.functional.best_of_n import best_of_n_weights


def win_rate(first: Tensor, second: Tensor, ns: Sequence[int]) -> Tensor:
    """Probability that the best of n of `first` beats the best of n of `second` on the same prompt, ties split.

        P(max_n first > max_n second) + P(max_n first = max_n second) / 2

    over all pairs of subsets of size n, drawn without replacement: unbiased, as in `best_of_n`. Sorting makes it
    O(M log M) a prompt: the maximum is the order statistic of rank t with probability `best_of_n_weights`.

    Args:
        first: [Q, M1] float rewards, NaN = not a sample.
        second: [Q, M2] float rewards of the same prompts.
        ns: Subset sizes, >= 1.

    Returns:
        [Q, len(ns)] float64; NaN where either has fewer than n samples.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"first, second: expected [prompts, samples] of the same prompts, got {shapes}")
    if any(n < 1 for n in ns):
        raise ValueError(f"ns: expected subset sizes of at least 1, got {list(ns)}")
    mine, my_counts = _ascending(first)
    theirs, their_counts = _ascending(second)
    below = torch.searchsorted(theirs, mine, side="left")
    not_above = torch.searchsorted(theirs, mine, side="right")
    columns = []
    for n in ns:
        weights = best_of_n_weights(my_counts, mine.shape[1], n).flip(1)
        cumulative = best_of_n_weights(their_counts, theirs.shape[1], n).flip(1).cumsum(dim=1)
        cumulative = torch.nn.functional.pad(cumulative, (1, 0))
        won = (cumulative.gather(1, below) + cumulative.gather(1, not_above)) / 2
        too_few = (my_counts < n) | (their_counts < n)
        columns.append((weights * won).sum(dim=1).masked_fill(too_few, float("nan")))
    return torch.stack(columns, dim=1)


def improvement(first: Tensor, second: Tensor) -> Tensor:
    """1 where `first` is larger, 1/2 where they tie, 0 where it is smaller; NaN where either is NaN.

    The mean over cells is the probability of improvement (Agarwal et al. 2021, "Deep RL at the edge of the statistical
    precipice"). There, any run of one is compared with any run of the other; here cells are paired by seed and prompt.

    Args:
        first: [S, Q, C] float.
        second: [S, Q, C] float, the same seeds and prompts.

    Returns:
        [S, Q, C] float64.
    """
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"first, second: expected the same seeds, prompts and columns, got shapes {shapes}")
    wins = (first > second).double() + 0.5 * (first == second).double()
    return wins.masked_fill(first.isnan() | second.isnan(), float("nan"))


def holm(p_values: Tensor) -> Tensor:
    """Adjusted p-values of K tests: rejecting those <= 0.05 makes any false rejection at most 5% likely.

        p~_(i) = max_{j <= i} min((K - j + 1) p_(j), 1),     p_(1) <= ... <= p_(K)

    Holm (1979), "A simple sequentially rejective multiple test procedure". Holds however the tests depend on another.

    Args:
        p_values: [K] float; NaN is not a test: it does not count in K and stays NaN.

    Returns:
        [K] float64.
    """
    adjusted = p_values.double().clone()
    tests = (~adjusted.isnan()).nonzero()[:, 0]
    ordered = adjusted[tests].sort()
    factors = torch.arange(len(tests), 0, -1, dtype=torch.float64)
    if len(tests):
        adjusted[tests[ordered.indices]] = (factors * ordered.values).clamp(max=1).cummax(dim=0).values
    return adjusted


def _ascending(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, M] float64 with the NaNs first as -inf, which weigh 0, and the number of samples, [Q]."""
    missing = rewards.isnan()
    return rewards.double().masked_fill(missing, float("-inf")).sort(dim=1).values, (~missing).sum(dim=1)
