"""The plug-in of the tail surrogate with coefficients that make it exactly unbiased at a finite group size."""

from functools import lru_cache

import numpy as np
from torch import Tensor

from tealightning.functional.moments import ratio_or_zero
from tealightning.functional.normal_tail import DEFAULT, Resolution, std_nodes, threshold_nodes, tilted_excess
from tealightning.functional.tail import expected_max_normal, tail_size, tail_statistics


@lru_cache(maxsize=1024)
def calibration_matrix(m: int, k: int, resolution: Resolution = DEFAULT) -> tuple[tuple[float, float], ...]:
    """`[[E B1 R, E B2 R], [E B1 (R^2-1), E B2 (R^2-1)]]` for standard normal R, each the mean over the group, where

        B1 = 1{top k} (R - r^),    B2 = 1{top k} ((R - mu^)^2 - (r^ - mu^)^2) / (2 sigma^)

    with `r^` the k-th largest of the m rewards, `mu^` and `sigma^` mean and population standard deviation of the k.
    Deterministic; accurate to better than 1e-6 (see `functional.normal_tail`).

    Args:
        m: Group size.
        k: Size of the tail, 3 <= k <= m.
    """
    matrix = np.zeros((2, 2))
    for r, weight in zip(*threshold_nodes(m, k, resolution.threshold), strict=True):
        matrix[:, 0] += weight * _linear_terms(r, k, resolution)
        matrix[:, 1] += weight * _quadratic_terms(r, k, resolution)
    return tuple(map(tuple, (matrix / m).tolist()))  # type: ignore[arg-type]


def _linear_terms(r: float, k: int, resolution: Resolution) -> np.ndarray:
    """`E[sum_j e_j x_j | r]` and `E[sum_j e_j (x_j^2 - 1) | r]` over the k - 1 excesses e_j = x_j - r: [2]."""
    one = tilted_excess(r, np.zeros(1), np.zeros(1), resolution.excess)
    e, p = one.excess[0], one.probability[0]
    x = r + e
    return (k - 1) * np.array([(p * e * x).sum(), (p * e * (x * x - 1)).sum()])


def _quadratic_terms(r: float, k: int, resolution: Resolution) -> np.ndarray:
    """`E[sum_j e_j (e_j - 2 e_mean)/(2 sigma) * (x_j, x_j^2 - 1) | r]`, where e_mean is over all k: [2].

    With g one of the scores, the sum over j of `e_j (e_j - 2 e_mean) g_j` is `sum e_j^2 g_j - (2/k) sum_l e_l sum_j
    e_j g_j`, and under a product of independent excesses its mean follows from one-excess moments.
    """
    n = k - 1
    nodes = std_nodes(r, n, resolution, members=k, below=0, with_threshold=True)
    one = tilted_excess(r, nodes.a, nodes.b, resolution.excess)
    e, p = one.excess, one.probability
    x = r + e
    mass = nodes.weight * np.exp(n * one.log_mass)
    mean_e = (p * e).sum(-1)
    terms = []
    for score in (x, x * x - 1):
        same = (p * e * e * score).sum(-1) * (1 - 2 / k)
        cross = mean_e * (p * e * score).sum(-1) * (2 * (n - 1) / k)
        terms.append(0.5 * n * (mass * (same - cross)).sum())
    return np.array(terms)


@lru_cache(maxsize=1024)
def calibrated_coefficients(m: int, target_n: int, alpha: float) -> tuple[float, float]:
    """`(a, b) = E(m, alpha)^-1 (1, c_N)`, with `E` the calibration matrix over alpha."""
    k = tail_size(alpha, m)
    matrix = np.array(calibration_matrix(m, k)) / alpha
    a, b = np.linalg.solve(matrix, [1.0, expected_max_normal(target_n)])
    return float(a), float(b)


def calibrated_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """`(1/alpha) [a e + b e (e - 2 e_mean)/(2 sigma)]` for the top k, 0 for the others.

    The weights of `functional.tail.direct_weights` with `(a, b)` of `calibrated_coefficients` in place of `(1, ct_N)`.

    Args:
        rewards: [P, m] float64, finite, with a tail of at least 3.

    Returns:
        [P, m] float64.
    """
    a, b = calibrated_coefficients(rewards.shape[1], target_n, alpha)
    tail = tail_statistics(rewards, alpha)
    excess = (rewards - tail.threshold).clamp(min=0)
    curvature = ratio_or_zero(excess - 2 * tail.mean_excess, tail.std)
    return excess * (a + 0.5 * b * curvature) / alpha
