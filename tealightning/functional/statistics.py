"""Means and differences over prompts with standard errors that treat the prompt as the unit of sampling.

Samples of one prompt share its difficulty, so counting them as independent would understate the error: every
function here takes one value a prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MeanEstimate(NamedTuple):
    """A mean over prompts."""

    mean: Tensor  # [...] float64; NaN without prompts
    standard_error: Tensor  # [...] float64; NaN with fewer than 2 prompts
    num_prompts: Tensor  # [...] int64, prompts that counted


def mean_over_prompts(values: Tensor) -> MeanEstimate:
    """Mean and standard error `std (ddof 1) / sqrt(prompts)` over the first dimension; NaN prompts are left out.

    Args:
        values: [Q] or [Q, C] float, one row a prompt.
    """
    values = values.double()
    counted = ~values.isnan()
    num_prompts = counted.sum(dim=0)
    count = num_prompts.double()
    mean = values.masked_fill(~counted, 0.0).sum(dim=0) / count  # 0/0 = NaN without prompts
    squares = (values - mean).masked_fill(~counted, 0.0).square().sum(dim=0)
    variance = squares / (count - 1).masked_fill(num_prompts < 2, float("nan"))
    return MeanEstimate(mean, (variance / count).sqrt(), num_prompts)


def paired_difference(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> MeanEstimate:
    """Mean of `after - before` over the prompts that both have, with its standard error.

    Pairing removes the spread between prompts, usually the larger part of either mean's error.

    Args:
        before: (keys [Q] int64, values [Q] or [Q, C] float), as `BestOfN.per_prompt` returns; keys must be unique.
        after: The same for the other run; its prompts may come in another order, or be others.

    Returns:
        The mean difference, its standard error and the number of matched prompts with both values.

    Raises:
        ValueError: if keys repeat or the values have different numbers of columns.
    """
    for name, (keys, values) in (("before", before), ("after", after)):
        if len(keys) != len(values) or keys.unique().numel() != len(keys):
            raise ValueError(f"{name} must have one value for each key and no key twice (average a prompt's first).")
    if before[1].shape[1:] != after[1].shape[1:]:
        raise ValueError(
            f"before and after must hold the same columns, got {tuple(before[1].shape)} and {tuple(after[1].shape)}."
        )
    first, second = _common_prompts(before, after[0]), _common_prompts(after, before[0])
    return mean_over_prompts(second - first)


def _common_prompts(keyed: tuple[Tensor, Tensor], others: Tensor) -> Tensor:
    """The values whose key is among `others`, sorted by key."""
    keys, values = keyed
    kept = torch.isin(keys, others)
    return values.double()[kept][keys[kept].argsort()]
