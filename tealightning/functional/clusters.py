"""Is a reward nearly discrete: one value shared by many samples, or two clusters with hardly anything between them?"""

import torch
from torch import Tensor

from tealightning.functional.moments import centred, ratio_or_zero

SMALLEST_CLUSTER = 3
"""Fewer samples are outliers, not a cluster."""


def largest_atom(values: Tensor) -> Tensor:
    """Share of each row that has the row's most frequent value, [Q] float64; 0 where all values differ.

    Args:
        values: [Q, k] float64.
    """
    ordered = values.sort(dim=1).values.contiguous()
    copies = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    return copies.masked_fill(copies == 1, 0).double().amax(dim=1) / values.shape[1]


def two_cluster_share(values: Tensor) -> Tensor:
    """Share of each row's variance that lies between two clusters, at the cut between neighbours that makes it largest.

        max over n of  n (k - n)/k * (mean of the n lowest - mean of the others)^2 / sum of squares,   3 <= n <= k - 3

    1 for two points; 0.64 for a Gaussian, 0.75 for a uniform distribution.

    Args:
        values: [Q, k] float64.

    Returns:
        [Q] float64; NaN without spread, and for k < 6.
    """
    size = values.shape[1]
    if size < 2 * SMALLEST_CLUSTER:
        return values.new_full((len(values),), float("nan"))
    deviations = centred(values.sort(dim=1).values)
    deviations = ratio_or_zero(deviations, deviations.abs().amax(dim=1, keepdim=True))  # squares stay in range
    count = torch.arange(1, size + 1, dtype=values.dtype, device=values.device)
    between = deviations.cumsum(dim=1).square() * size / (count * (size - count).clamp(min=1))
    total = deviations.square().sum(dim=1)
    largest = between[:, SMALLEST_CLUSTER - 1 : size - SMALLEST_CLUSTER].amax(dim=1)
    return largest / total.masked_fill(total == 0, float("nan"))
