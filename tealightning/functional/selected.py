"""Best-of-n under a proxy, scored by the gold reward: what one reward picks, measured by another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tealightning.functional.best_of_n import best_of_n_weights


def best_of_n_selected(proxy: Tensor, other: Tensor, ns: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Unbiased estimate of `E[other of the sample with the largest proxy among n]` for each prompt.

        sum_t w_t * other_(t),     t = 0, 1, ... by descending proxy, w of `best_of_n_weights`

    It is the mean over all subsets of size n. Of samples that tie in the proxy any is picked with equal probability:
    each gets the mean of `other` over the tied ones. With `other = proxy` it is `best_of_n`. Where the curve bends
    down in n, the proxy is over-optimised (Gao, Schulman and Hilton 2023; the estimator is that of
    Nakano et al. 2021, "WebGPT").

    Args:
        proxy: [P, M] float, M >= 1; what selects. NaN = not a sample.
        other: [P, M] float; what is reported. A sample whose `other` is NaN is not a sample either, also for the
            selection: the estimate is that of the samples with both rewards.
        ns: Subset sizes, >= 1.
        valid: [P, M] bool, False = not a sample; None = all.

    Returns:
        [P, len(ns)] float64; NaN where a prompt has fewer than n samples.
    """
    if proxy.shape != other.shape or proxy.ndim != 2:
        shapes = f"{tuple(proxy.shape)} and {tuple(other.shape)}"
        raise ValueError(f"proxy, other: expected [prompts, samples] of the same samples, got shapes {shapes}")
    if any(n < 1 for n in ns):
        raise ValueError(f"ns: expected subset sizes of at least 1, got {list(ns)}")
    usable = ~(proxy.isnan() | other.isnan())
    if valid is not None:
        usable = usable & valid
    counts = usable.sum(dim=1)
    descending = proxy.double().masked_fill(~usable, float("-inf")).sort(dim=1, descending=True)
    # A -inf proxy may be a sample; a stable second sort keeps all samples before the unusable.
    order = descending.indices.gather(1, (~usable).gather(1, descending.indices).int().argsort(dim=1, stable=True))
    used = torch.arange(proxy.shape[1], device=proxy.device) < counts[:, None]
    picked = other.double().gather(1, order).masked_fill(~used, 0.0)
    picked = _tie_means(proxy.double().gather(1, order), picked, used)
    first = picked[:, :1]
    offsets = (picked - first).masked_fill(~used, 0.0)  # differences keep digits, and constants exact
    columns = []
    for n in ns:
        estimate = first[:, 0] + (best_of_n_weights(counts, proxy.shape[1], n) * offsets).sum(dim=1)
        columns.append(estimate.masked_fill(counts < n, float("nan")))
    return torch.stack(columns, dim=1)


def _tie_means(keys: Tensor, values: Tensor, used: Tensor) -> Tensor:
    """Means of `values` over runs of equal `keys` among the `used`, at every member of the run; all [P, M]."""
    starts = torch.ones_like(used)
    starts[:, 1:] = (keys[:, 1:] != keys[:, :-1]) | (used[:, 1:] != used[:, :-1])
    run = starts.long().cumsum(dim=1) - 1
    first = values.gather(1, starts.long().mul(torch.arange(keys.shape[1], device=keys.device)).cummax(dim=1).values)
    sums = torch.zeros_like(values).scatter_add(1, run, values - first)
    sizes = torch.zeros_like(values).scatter_add(1, run, torch.ones_like(values))
    return first + (sums / sizes.clamp(min=1)).gather(1, run)
