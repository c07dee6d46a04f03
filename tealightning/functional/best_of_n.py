"""Unbiased best-of-n, best-of-n under a proxy scored by gold, and comparisons of two policies.

Results over budgets are [P, len(ns)] float64, NaN where a prompt has fewer than n samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_n_weights(counts: Tensor, width: int, n: int) -> Tensor:
    """Weights of the order statistics in the mean of the maximum over subsets of size n, best first:

        w_t = C(M-1-t, n-1) / C(M, n),     t = 0..M-1

    `w_0 = n/M` and `w_{t+1} = w_t * (M-t-n)/(M-t-1)`: no factorials, so M of many thousands is safe. `counts` [P] int64
    are the M of each prompt; the result, [P, width] float64, is 0 from rank M on. Its rows sum to 1 where n <= M and
    mean nothing elsewhere.

    >>> best_of_n_weights(torch.tensor([4]), 4, 2)
    tensor([[0.5000, 0.3333, 0.1667, 0.0000]], dtype=torch.float64)
    """
    samples = counts.double()[:, None]
    rank = torch.arange(width - 1, dtype=torch.float64, device=counts.device)
    ratios = ((samples - rank - n) / (samples - rank - 1).clamp(min=1)).clamp(min=0)
    return torch.cat([n / samples.clamp(min=1), n / samples.clamp(min=1) * ratios.cumprod(-1)], dim=-1)


def _mean_over_subsets(ordered: Tensor, counts: Tensor, ns: Sequence[int]) -> Tensor:
    """Mean over all subsets of size n of the value at the best rank; `ordered` [P, M] holds values, best rank first."""
    first = ordered[:, :1]
    used = torch.arange(ordered.shape[1], device=ordered.device) < counts[:, None]
    offsets = (ordered - first).masked_fill(~used, 0.0)  # differences keep digits, and constants exact
    columns = []
    for n in ns:
        estimate = first[:, 0] + (best_of_n_weights(counts, ordered.shape[1], n) * offsets).sum(dim=1)
        columns.append(estimate.masked_fill(counts < n, float("nan")))
    return torch.stack(columns, dim=1)


def best_of_n(rewards: Tensor, ns: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Unbiased estimate of `E[max of n]` for each prompt: the mean of the maximum over all subsets of size n.

        sum_{j >= n} C(j-1, n-1)/C(M, n) * R_(j),     R_(1) <= ... <= R_(M)

    For 0/1 rewards it is pass@n (Chen et al. 2021). A bootstrap, which draws with replacement, would be biased low.

    >>> best_of_n(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), [1, 2, 4])
    tensor([[0.2500, 0.5000, 1.0000]], dtype=torch.float64)
    """
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    descending = rewards.double().masked_fill(~valid, float("-inf")).sort(dim=1, descending=True).values
    return _mean_over_subsets(descending, valid.sum(dim=1), ns)


def best_of_n_selected(proxy: Tensor, other: Tensor, ns: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Unbiased estimate of `E[other of the sample with the largest proxy among n]` for each prompt.

        sum_t w_t * other_(t),     t = 0, 1, ... by descending proxy, w of `best_of_n_weights`

    It is the mean over all subsets of size n. Of samples that tie in the proxy any is picked with equal probability:
    each gets the mean of `other` over the tied ones. With `other = proxy` it is `best_of_n`. Where the curve bends
    down in n, the proxy is over-optimised (Gao, Schulman and Hilton 2023; the estimator is that of
    Nakano et al. 2021, "WebGPT"). Both are [P, M] float (else a ValueError); where either is NaN there is no sample,
    also for the selection.

    >>> proxy, gold = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 6.0, 3.0]])
    >>> best_of_n_selected(proxy, gold, [1, 2, 3])
    tensor([[3., 4., 3.]], dtype=torch.float64)
    """
    if proxy.shape != other.shape or proxy.ndim != 2:
        shapes = f"{tuple(proxy.shape)} and {tuple(other.shape)}"
        raise ValueError(f"proxy, other: expected [prompts, samples] of the same samples, got shapes {shapes}")
    _check_budgets(ns)
    usable = ~(proxy.isnan() | other.isnan())
    if valid is not None:
        usable = usable & valid
    counts = usable.sum(dim=1)
    descending = proxy.double().masked_fill(~usable, float("-inf")).sort(dim=1, descending=True)
    # A -inf proxy may be a sample; a stable second sort keeps all samples before the unusable.
    order = descending.indices.gather(1, (~usable).gather(1, descending.indices).int().argsort(dim=1, stable=True))
    used = torch.arange(proxy.shape[1], device=proxy.device) < counts[:, None]
    picked = other.double().gather(1, order).masked_fill(~used, 0.0)
    return _mean_over_subsets(_tie_means(proxy.double().gather(1, order), picked, used), counts, ns)


def _tie_means(keys: Tensor, values: Tensor, used: Tensor) -> Tensor:
    """Means of `values` over runs of equal `keys` among the `used`, at every member of the run; all [P, M]."""
    starts = torch.ones_like(used)
    starts[:, 1:] = (keys[:, 1:] != keys[:, :-1]) | (used[:, 1:] != used[:, :-1])
    run = starts.long().cumsum(dim=1) - 1
    first = values.gather(1, starts.long().mul(torch.arange(keys.shape[1], device=keys.device)).cummax(dim=1).values)
    sums = torch.zeros_like(values).scatter_add(1, run, values - first)
    sizes = torch.zeros_like(values).scatter_add(1, run, torch.ones_like(values))
    return first + (sums / sizes.clamp(min=1)).gather(1, run)


def _check_budgets(ns: Sequence[int]) -> None:
    if any(n < 1 for n in ns):
        raise ValueError(f"ns: expected subset sizes of at least 1, got {list(ns)}")


def win_rate(first: Tensor, second: Tensor, ns: Sequence[int]) -> Tensor:
    """Probability that the best of n of `first` beats the best of n of `second` on the same prompt, ties split.

        P(max_n first > max_n second) + P(max_n first = max_n second) / 2

    over all pairs of subsets of size n, drawn without replacement: unbiased, as in `best_of_n`. Sorting makes it
    O(M log M) a prompt: the maximum is the order statistic of rank t with probability `best_of_n_weights`. `first`
    [Q, M1] and `second` [Q, M2] are rewards of the same prompts (else a ValueError), NaN = not a sample.

    >>> win_rate(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2.0]]), [1, 2])
    tensor([[0.5000, 1.0000]], dtype=torch.float64)
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"first, second: expected [prompts, samples] of the same prompts, got {shapes}")
    _check_budgets(ns)
    counts = [(~rewards.isnan()).sum(dim=1) for rewards in (first, second)]
    # The missing come first, as -inf, and weigh 0.
    mine, theirs = (r.double().masked_fill(r.isnan(), float("-inf")).sort(dim=1).values for r in (first, second))
    below = torch.searchsorted(theirs, mine, side="left")
    not_above = torch.searchsorted(theirs, mine, side="right")
    columns = []
    for n in ns:
        weights = best_of_n_weights(counts[0], mine.shape[1], n).flip(1)
        cumulative = best_of_n_weights(counts[1], theirs.shape[1], n).flip(1).cumsum(dim=1)
        cumulative = torch.nn.functional.pad(cumulative, (1, 0))
        won = (cumulative.gather(1, below) + cumulative.gather(1, not_above)) / 2
        columns.append((weights * won).sum(dim=1).masked_fill(torch.minimum(*counts) < n, float("nan")))
    return torch.stack(columns, dim=1)


def improvement(first: Tensor, second: Tensor) -> Tensor:
    """Improvement indicator: 1 where `first` is larger, 1/2 where they tie, 0 where it is smaller; NaN stays.

    The mean over cells is the probability of improvement (Agarwal et al. 2021, "Deep RL at the edge of the statistical
    precipice"). There, any run of one is compared with any run of the other; here cells are paired by seed and prompt.
    Both are [S, Q, C] of the same seeds, prompts and columns, else a ValueError.

    >>> improvement(torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]]))
    tensor([[[1.0000, 0.5000, 0.0000]]], dtype=torch.float64)
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
    A NaN in `p_values` [K] is not a test: it does not count in K and stays NaN.

    >>> holm(torch.tensor([0.01, 0.04, 0.03], dtype=torch.float64))
    tensor([0.0300, 0.0600, 0.0600], dtype=torch.float64)
    """
    adjusted = p_values.double().clone()
    tests = (~adjusted.isnan()).nonzero()[:, 0]
    ordered = adjusted[tests].sort()
    factors = torch.arange(len(tests), 0, -1, dtype=torch.float64)
    if len(tests):
        adjusted[tests[ordered.indices]] = (factors * ordered.values).clamp(max=1).cummax(dim=0).values
    return adjusted
