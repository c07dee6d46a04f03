"""Leave-one-out sums: what the other rollouts of a group add up to."""

import torch
from torch import Tensor


def _sum_before(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[..., :1]), values[..., :-1].cumsum(dim=-1)], dim=-1)


def sum_of_others(values: Tensor) -> Tensor:
    """`sum_{j != i} x_j` over the last dimension, from the two partial sums beside i.

    Subtracting x_i from the whole sum would leave rounding noise where x_i is much larger than all others together.

    Args:
        values: [..., m] float.

    Returns:
        [..., m].
    """
    return _sum_before(values) + _sum_before(values.flip(-1)).flip(-1)
