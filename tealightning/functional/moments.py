"""Moments of groups of rewards that stay exact for constant groups and finite for extreme magnitudes."""

from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """`x_i - mean(x)` over the last dimension, exactly 0 in a constant group.

    The maximum is subtracted first: the mean of m equal floats need not be that float (three times 0.1), and rewards
    with a large common offset keep their digits.

    Args:
        values: [..., m] float.
    """
    from_max = values - values.amax(dim=-1, keepdim=True)
    return from_max - from_max.mean(dim=-1, keepdim=True)


def root_mean_square(values: Tensor, count: Tensor | int) -> Tensor:
    """`sqrt(sum(x^2) / count)` over the last dimension, without overflow or underflow of the squares.

    Args:
        values: [..., m] float.
        count: What to divide by: m, m - 1, or a tensor [..., 1].

    Returns:
        [..., 1]; 0 where all values are 0.
    """
    largest = values.abs().amax(dim=-1, keepdim=True)
    unit = values / largest.masked_fill(largest == 0, 1.0)
    return largest * (unit.square().sum(dim=-1, keepdim=True) / count).sqrt()


def sample_std(values: Tensor) -> Tensor:
    """Standard deviation with divisor m - 1 over the last dimension, [..., 1]; exactly 0 in a constant group.

    Args:
        values: [..., m] float, m >= 2.
    """
    return root_mean_square(centred(values), values.shape[-1] - 1)


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is 0 (a group without spread carries no signal)."""
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
