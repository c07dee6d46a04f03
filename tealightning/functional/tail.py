"""The Gaussian-tail surrogate of best-of-N: constants, plug-in weights, and the two ways to remove their bias.

Source: Li, Qian, Mou, "What should post-training optimize? A test-time scaling law perspective" (arXiv 2605.10716).
If the upper tail of the reward is Gaussian, the mean `mu_a` and the standard deviation `sigma_a` of its upper `alpha`
part identify it, and `E[max of N] ~ mu_a + ct_N * sigma_a`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import log_ndtr, ndtri
from torch import Tensor

from tealightning.functional.moments import ratio_or_zero, root_mean_square
from tealightning.functional.normal_tail import DEFAULT, Resolution, std_nodes, threshold_nodes, tilted_excess

_ROUNDING = 1e-9  # alpha * m this far above an integer is that integer (0.1 * 30 = 3.0000000000000004)


def tail_size(alpha: float, m: int) -> int:
    """Size of the tail, `k = ceil(alpha * m)`, at least 1, unharmed by float error: `tail_size(0.1, 30) == 3`.

    >>> tail_size(0.25, 16)
    4
    """
    return max(1, math.ceil(alpha * m - _ROUNDING))


def smallest_group(alpha: float, k: int) -> int:
    """The smallest m whose tail has at least `k` rollouts: `smallest_group(0.25, 2) == 5`.

    >>> smallest_group(0.25, 2)
    5
    """
    m = max(1, math.floor((k - 1) / alpha))
    while tail_size(alpha, m) < k:
        m += 1
    return m


@lru_cache(maxsize=1)
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [-1, 1]."""
    return np.polynomial.legendre.leggauss(400)


@lru_cache(maxsize=1024)
def expected_max_normal(n: int) -> float:
    """Expected maximum `c_n` of n standard normals, accurate to about 1e-13.

        c_n = integral over x > 0 of 1 - Phi(x)^n - Phi(-x)^n

    by Gauss-Legendre quadrature up to where the integrand falls below float64.

    >>> round(expected_max_normal(2), 6)  # 1/sqrt(pi)
    0.56419
    """
    upper = math.sqrt(2 * (math.log(n) + 40))
    nodes, weights = _quadrature()
    x = (nodes + 1) * upper / 2
    integrand = -np.expm1(n * log_ndtr(x)) - np.exp(n * log_ndtr(-x))
    return float(np.dot(weights, integrand) * upper / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailConstants:
    """Constants of the surrogate for one `(target_n, alpha)`.

    `z = Phi^-1(1 - alpha)` is the threshold, `lambda_ = phi(z)/alpha` the mean and `kappa` the standard deviation
    of a standard normal above it, `kappa^2 = 1 + z lambda - lambda^2`, and `ct_n = (c_n - lambda)/kappa`.
    """

    c_n: float
    z: float
    lambda_: float
    kappa: float
    ct_n: float


@lru_cache(maxsize=1024)
def tail_constants(target_n: int, alpha: float) -> TailConstants:
    """The constants for best-of-`target_n` from the upper `alpha` tail; `alpha = 1` is the whole Gaussian.

    >>> round(tail_constants(128, 0.25).ct_n, 3)
    2.692
    """
    z = float(-ndtri(alpha))
    lambda_ = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / alpha
    kappa = math.sqrt(1 + z * lambda_ - lambda_**2) if alpha < 1 else 1.0
    c_n = expected_max_normal(target_n)
    return TailConstants(c_n=c_n, z=z, lambda_=lambda_, kappa=kappa, ct_n=(c_n - lambda_) / kappa)


class TailStatistics(NamedTuple):
    """Statistics of the top k rewards of every prompt, each [P, 1] float64; NaN where a prompt has no reward."""

    threshold: Tensor  # r^, the smallest of the k
    mean_excess: Tensor  # mean of the k minus the threshold
    std: Tensor  # population standard deviation of the k
    k: Tensor  # int64


def tail_statistics(rewards: Tensor, alpha: float, valid: Tensor | None = None) -> TailStatistics:
    """Threshold, mean excess and standard deviation of each prompt's top `k = ceil(alpha * M)` rewards.

    Args:
        rewards: [P, M] float.
        alpha: Upper-tail level in (0, 1].
        valid: [P, M] bool, False = not a sample; None = all. M is counted per prompt.

    >>> [value.item() for value in tail_statistics(torch.tensor([[0.0, 1.0, 2.0, 4.0]]), alpha=0.5)]
    [2.0, 1.0, 1.0, 2]
    """
    values = rewards.double()
    counts = torch.full_like(values[:, :1], rewards.shape[1]) if valid is None else valid.sum(1, keepdim=True).double()
    k = (alpha * counts - _ROUNDING).ceil().clamp(min=1).long()
    if valid is not None:
        values = values.masked_fill(~valid, float("-inf"))
    top = values.topk(int(k.max()) if k.numel() else 0, dim=1).values
    threshold = top.gather(1, k - 1).masked_fill(counts == 0, float("nan"))
    in_tail = torch.arange(top.shape[1], device=top.device) < k
    excess = (top - threshold).masked_fill(~in_tail, 0.0)
    mean_excess = excess.sum(1, keepdim=True) / k
    std = root_mean_square((excess - mean_excess).masked_fill(~in_tail, 0.0), k)
    return TailStatistics(threshold, mean_excess, std, k)


def direct_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Plug-in weights of the surrogate's gradient, from the group's own tail: `gaussian_influence` of its excesses.

    Ties at the threshold weigh 0 whichever of them count as top k. `sigma = 0` (which includes k = 1) gives zeros, and
    with k = 2 the quadratic term vanishes.

    Args:
        rewards: [P, m] float64, finite.
        target_n: N of the objective.
        alpha: Upper-tail level in (0, 1].

    Returns:
        [P, m] float64.

    >>> direct_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[-0.0000, -0.0000, 0.1151, 4.7309]], dtype=torch.float64)
    """
    tail = tail_statistics(rewards, alpha)
    excess = (rewards - tail.threshold).clamp(min=0)
    return gaussian_influence(excess, tail.mean_excess, tail.std, target_n=target_n, alpha=alpha)


def gaussian_influence(excess: Tensor, mean_excess: Tensor, std: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Influence function of `mu_a + ct_N sigma_a` at a reward, 0 at and below the threshold.

    With `e = u - r` the excess of the reward u over the threshold r,

        w(u) = (1/alpha) [ e + ct_N/(2 sigma) ((u - mu)^2 - (r - mu)^2) ]
             = (e/alpha) [ 1 + ct_N (e - 2 e_mean)/(2 sigma) ]

    It is negative between the threshold and about the tail mean: those rollouts hold the spread back.

    Args:
        excess: [P, m] float64, 0 at and below the threshold.
        mean_excess: [P, 1], of the tail.
        std: [P, 1], population standard deviation of the tail.

    >>> excess, mean, std = torch.tensor([[[0.0]], [[1.0]], [[1.0]]], dtype=torch.float64)
    >>> gaussian_influence(excess + 3, mean, std, target_n=8, alpha=0.5)
    tensor([[9.1140]], dtype=torch.float64)
    """
    curvature = ratio_or_zero(excess - 2 * mean_excess, std)
    return excess * (1 + 0.5 * tail_constants(target_n, alpha).ct_n * curvature) / alpha


def extrapolated_best_of_n(
    rewards: Tensor, ns: Sequence[int], *, alpha: float = 0.25, valid: Tensor | None = None
) -> Tensor:
    """Extrapolate best-of-n beyond the sample, `mu_a + ct_n * sigma_a`, right if the upper tail is Gaussian.

    A plug-in, biased low by O(1/M); never to be reported under the name of a measured value.

    Args:
        rewards: [P, M] float.
        ns: Budgets.
        alpha: Upper-tail level in (0, 1].
        valid: [P, M] bool, False = not a sample; None = all.

    Returns:
        [P, len(ns)] float64; NaN where the tail has fewer than 2 samples.

    >>> extrapolated_best_of_n(torch.tensor([[0.0, 1.0, 2.0, 4.0]]), [8, 64], alpha=0.5)
    tensor([[4.0380, 5.5644]], dtype=torch.float64)
    """
    tail = tail_statistics(rewards, alpha, valid)
    ct = torch.tensor([tail_constants(n, alpha).ct_n for n in ns], dtype=torch.float64, device=rewards.device)
    return (tail.threshold + tail.mean_excess + ct * tail.std).masked_fill(tail.k < 2, float("nan"))


@lru_cache(maxsize=1024)
def calibration_matrix(m: int, k: int, resolution: Resolution = DEFAULT) -> tuple[tuple[float, float], ...]:
    """Expected gradient of the two basis functions for standard normal R, each the mean over the group:

        [[E B1 R, E B2 R], [E B1 (R^2-1), E B2 (R^2-1)]]

        B1 = 1{top k} (R - r^),    B2 = 1{top k} ((R - mu^)^2 - (r^ - mu^)^2) / (2 sigma^)

    with `r^` the k-th largest of the m rewards, `mu^` and `sigma^` mean and population standard deviation of the k.
    Deterministic; accurate to better than 1e-6 (see `functional.normal_tail`). Needs 3 <= k <= m.

    >>> round(calibration_matrix(8, 4)[0][0], 3)
    0.375
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
    """Coefficients of the exactly unbiased weights, with `E` the calibration matrix over alpha:

        (a, b) = E(m, alpha)^-1 (1, c_N)

    >>> [round(c, 3) for c in calibrated_coefficients(16, 128, 0.25)]
    [1.728, 8.416]
    """
    k = tail_size(alpha, m)
    matrix = np.array(calibration_matrix(m, k)) / alpha
    a, b = np.linalg.solve(matrix, [1.0, expected_max_normal(target_n)])
    return float(a), float(b)


def calibrated_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Calibrated weights of the top k, 0 for the others:

        (1/alpha) [a e + b e (e - 2 e_mean)/(2 sigma)]

    The weights of `functional.tail.direct_weights` with `(a, b)` of `calibrated_coefficients` in place of `(1, ct_N)`.

    Args:
        rewards: [P, m] float64, finite, with a tail of at least 3.

    Returns:
        [P, m] float64.

    >>> calibrated_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[-0.0000, -0.0000, -3.6408,  9.9167]], dtype=torch.float64)
    """
    a, b = calibrated_coefficients(rewards.shape[1], target_n, alpha)
    tail = tail_statistics(rewards, alpha)
    excess = (rewards - tail.threshold).clamp(min=0)
    curvature = ratio_or_zero(excess - 2 * tail.mean_excess, tail.std)
    return excess * (a + 0.5 * b * curvature) / alpha


def prefix_sizes(m: int, num_prefixes: int) -> tuple[int, ...]:
    """Prefix sizes `round(j * m / num_prefixes)`, j = 1..num_prefixes: strictly growing up to m >= num_prefixes.

    >>> prefix_sizes(16, 4)
    (4, 8, 12, 16)
    """
    return tuple(round(j * m / num_prefixes) for j in range(1, num_prefixes + 1))


@lru_cache(maxsize=1024)
def jackknife_weights(sizes: tuple[int, ...], order: int) -> tuple[float, ...]:
    """Minimum-norm weights v with `sum_j v_j = 1` and `sum_j v_j P_j^-s = 0` for s = 1..order-1.

    They cancel the first `order - 1` powers of 1/P in the bias (Schucany, Gray and Owen 1971).

    Args:
        sizes: Prefix sizes P_1 < ... < P_J.
        order: 1 (no cancellation) to J.

    >>> [round(weight, 3) for weight in jackknife_weights((8, 16), 2)]
    [-1.0, 2.0]
    """
    inverse = sizes[-1] / np.array(sizes, dtype=np.float64)
    conditions = inverse ** np.arange(order)[:, None]
    target = np.zeros(order)
    target[0] = 1.0
    return tuple(np.linalg.lstsq(conditions, target, rcond=None)[0].tolist())


def prefix_weights(
    rewards: Tensor, plug_in: Callable[[Tensor], Tensor], *, num_prefixes: int, order: int, rotations: int
) -> Tensor:
    """Jackknife over prefixes of the group, averaged over rotations:

        A_i = sum_j v_j (m/P_j) 1{i < P_j} plug_in_i(first P_j rollouts)

    Rotation r of R starts the order at rollout `r*m // R`: the same expectation with less variance. A prefix whose
    tail has one rollout contributes zeros.

    Args:
        rewards: [P, m] float64, finite, m >= num_prefixes.
        plug_in: Weights [P, size] of groups [P, size]; biased in powers of 1/size.

    Returns:
        [P, m] float64.

    >>> rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64)
    >>> prefix_weights(rewards, lambda group: group - group.mean(), num_prefixes=2, order=2, rotations=1)
    tensor([[-2.5000, -2.5000,  0.5000,  4.5000]], dtype=torch.float64)
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
