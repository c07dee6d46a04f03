"""Bias removal by combining the plug-in weights of growing prefixes of the group (generalised jackknife)."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def prefix_sizes(m: int, num_prefixes: int) -> tuple[int, ...]:
    """`round(j * m / num_prefixes)` for j = 1..num_prefixes: strictly growing, ends at m (needs m >= num_prefixes)."""
    return tuple(round(j * m / num_prefixes) for j in range(1, num_prefixes + 1))


@lru_cache(maxsize=1024)
def jackknife_weights(sizes: tuple[int, ...], order: int) -> tuple[float, ...]:
    """Minimum-norm weights v with `sum_j v_j = 1` and `sum_j v_j P_j^-s = 0` for s = 1..order-1.

    They cancel the first `order - 1` powers of 1/P in the bias (Schucany, Gray and Owen 1971).

    Args:
        sizes: Prefix sizes P_1 < ... < P_J.
        order: 1 (no cancellation) to J.
    """
    inverse = sizes[-1] / np.array(sizes, dtype=np.float64)
    conditions = inverse ** np.arange(order)[:, None]
    target = np.zeros(order)
    target[0] = 1.0
    return tuple(np.linalg.lstsq(conditions, target, rcond=None)[0].tolist())


def prefix_weights(
    rewards: Tensor, plug_in: Callable[[Tensor], Tensor], *, num_prefixes: int, order: int, rotations: int
) -> Tensor:
    """`A_i = sum_j v_j (m/P_j) 1{i < P_j} plug_in_i(first P_j rollouts)`, averaged over rotations of the group.

    Rotation r of R starts the order at rollout `r*m // R`: the same expectation with less variance. A prefix whose
    tail has one rollout contributes zeros.

    Args:
        rewards: [P, m] float64, finite, m >= num_prefixes.
        plug_in: Weights [P, size] of groups [P, size]; biased in powers of 1/size.

    Returns:
        [P, m] float64.
    """
    m = rewards.shape[1]
    sizes = prefix_sizes(m, num_prefixes)
    total = torch.zeros_like(rewards)
    for start in (r * m // rotations for r in range(rotations)):
        rolled = rewards.roll(-start, dims=1)
        advantages = torch.zeros_like(rewards)
        for size, weight in zip(sizes, jackknife_weights(sizes, order), strict=True):
            advantages[:, :size] += plug_in(rolled[:, :size]) * (weight * m / size)
        total += advantages.roll(start, dims=1)
    return total / rotations
