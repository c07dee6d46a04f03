"""Moments, leave-one-out sums and ranks of groups of rewards, over the last dimension.

Scales are [..., 1], everything else has the shape of its input.
"""

import torch
from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """Subtract the mean; exactly 0 in a constant group.

    The maximum is subtracted first: the mean of m equal floats need not be that float (three times 0.1), and rewards
    with a large common offset keep their digits.

    >>> centred(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-2., -1.,  3.]])
    """
    from_max = values - values.amax(dim=-1, keepdim=True)
    return from_max - from_max.mean(dim=-1, keepdim=True)


def root_mean_square(values: Tensor, count: Tensor | int) -> Tensor:
    """Root mean square `sqrt(sum(x^2) / count)` without overflow or underflow of the squares; 0 where all are 0.

    >>> root_mean_square(torch.tensor([[3.0, 4.0]]), 1)
    tensor([[5.]])
    """
    largest = values.abs().amax(dim=-1, keepdim=True)
    unit = values / largest.masked_fill(largest == 0, 1.0)
    return largest * (unit.square().sum(dim=-1, keepdim=True) / count).sqrt()


def sample_std(values: Tensor) -> Tensor:
    """Standard deviation with divisor m - 1, for m >= 2; exactly 0 in a constant group.

    >>> sample_std(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1.]])
    """
    return root_mean_square(centred(values), values.shape[-1] - 1)


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 where the denominator is 0 (a group without spread carries no signal).

    >>> ratio_or_zero(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _sum_before(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[..., :1]), values[..., :-1].cumsum(dim=-1)], dim=-1)


def sum_of_others(values: Tensor) -> Tensor:
    """Leave-one-out sums `sum_{j != i} x_j`, from the two partial sums beside i.

    Subtracting x_i from the whole sum would leave rounding noise where x_i is much larger than all others together.

    >>> sum_of_others(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[5., 4., 3.]])
    """
    return _sum_before(values) + _sum_before(values.flip(-1)).flip(-1)


def below_and_tied(values: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many of a row are smaller, and how many equal (itself included); compared with those of `among`, if given.

    >>> below_and_tied(torch.tensor([[5.0, 1.0, 5.0]]))
    (tensor([[1, 0, 1]]), tensor([[2, 1, 2]]))
    """
    values = values.contiguous()
    ascending = (values if among is None else among).sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ascending, values)
    return below, torch.searchsorted(ascending, values, right=True) - below


def mid_rank_quantiles(rewards: Tensor) -> Tensor:
    """Mid-rank quantiles, in [1/(2m), 1 - 1/(2m)]; a constant group gets 1/2:

        q_i = (#{j: R_j < R_i} + #{j: R_j = R_i}/2) / m

    >>> mid_rank_quantiles(torch.tensor([[5.0, 1.0, 5.0, 9.0]]))
    tensor([[0.5000, 0.1250, 0.5000, 0.8750]], dtype=torch.float64)
    """
    below, tied = below_and_tied(rewards)
    return (below.double() + tied.double() / 2) / rewards.shape[-1]


def win_rates(rewards: Tensor) -> Tensor:
    """Win rates: share of the *other* rollouts that a rollout beats, ties counting half; 1/2 in a constant group.

    >>> win_rates(torch.tensor([[5.0, 1.0, 5.0]]))
    tensor([[0.7500, 0.0000, 0.7500]], dtype=torch.float64)
    """
    below, tied = below_and_tied(rewards)
    return (below.double() + (tied.double() - 1) / 2) / (rewards.shape[-1] - 1)


def best_of_n_rank_weights(quantiles: Tensor, n: int) -> Tensor:
    """Density ratio `N q_i^(N-1)` of the best of N to a single draw at quantile q_i in (0, 1), divided by its mean.

    Normalised in log space: neither a large N nor a small q underflows to 0/0.

    >>> best_of_n_rank_weights(torch.tensor([[0.25, 0.75]], dtype=torch.float64), n=2)
    tensor([[0.5000, 1.5000]], dtype=torch.float64)
    """
    return torch.softmax((n - 1) * quantiles.log(), dim=-1) * quantiles.shape[-1]


def exponential_tilt(quantiles: Tensor, tilt: float) -> Tensor:
    """Exponential tilt of quantiles, from 0 to 1: linear for small t > 0, nothing but the top for large t.

        (exp(t q) - 1)/(exp(t) - 1)

    Evaluated as `exp(t (q - 1)) * expm1(-t q)/expm1(-t)`, whose factors never exceed 1.

    >>> exponential_tilt(torch.tensor([0.0, 0.5, 1.0]), tilt=10)
    tensor([0.0000, 0.0067, 1.0000])
    """
    scale = torch.expm1(quantiles.new_tensor(-tilt))
    return torch.exp(tilt * (quantiles - 1)) * torch.expm1(-tilt * quantiles) / scale
