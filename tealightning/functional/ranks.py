"""Ranks of the rewards within their group, ties sharing the middle of the places that they take."""

import torch
from torch import Tensor


def _below_and_tied(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """How many rewards of the group are smaller, and how many equal (itself included): both [P, m] float64."""
    values = rewards.contiguous()
    ascending = values.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ascending, values)
    return below.double(), (torch.searchsorted(ascending, values, right=True) - below).double()


def mid_rank_quantiles(rewards: Tensor) -> Tensor:
    """`q_i = (#{j: R_j < R_i} + #{j: R_j = R_i}/2) / m`, in [1/(2m), 1 - 1/(2m)]; a constant group gets 1/2.

    Args:
        rewards: [P, m] float.

    Returns:
        [P, m] float64.
    """
    below, tied = _below_and_tied(rewards)
    return (below + tied / 2) / rewards.shape[-1]


def win_rates(rewards: Tensor) -> Tensor:
    """Share of the *other* rollouts that a rollout beats, a tie counting half: in [0, 1]; 1/2 in a constant group.

    Args:
        rewards: [P, m] float, m >= 2.

    Returns:
        [P, m] float64.
    """
    below, tied = _below_and_tied(rewards)
    return (below + (tied - 1) / 2) / (rewards.shape[-1] - 1)


def best_of_n_rank_weights(quantiles: Tensor, n: int) -> Tensor:
    """`N q_i^(N-1)`, the density ratio of the best of N to a single draw at quantile q_i, divided by its group mean.

    Normalised in log space: neither a large N nor a small q underflows to 0/0.

    Args:
        quantiles: [P, m] float64 in (0, 1).
        n: N, >= 1.

    Returns:
        [P, m] float64, each row with mean 1.
    """
    return torch.softmax((n - 1) * quantiles.log(), dim=-1) * quantiles.shape[-1]


def exponential_tilt(quantiles: Tensor, tilt: float) -> Tensor:
    """`(exp(t q) - 1)/(exp(t) - 1)`: from 0 to 1, linear for small t, nothing but the top for large t.

    Evaluated as `exp(t (q - 1)) * expm1(-t q)/expm1(-t)`, whose factors never exceed 1.

    Args:
        quantiles: [...] float64 in [0, 1].
        tilt: t > 0.

    Returns:
        [...] float64 in [0, 1].
    """
    scale = torch.expm1(quantiles.new_tensor(-tilt))
    return torch.exp(tilt * (quantiles - 1)) * torch.expm1(-tilt * quantiles) / scale
