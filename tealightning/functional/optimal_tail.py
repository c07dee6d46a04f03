"""Exactly unbiased tail weights: calibrated plug-in weights, and the least noisy ones, with coefficients for each rank.

Both are found for standard normal rewards; location and scale do not matter, because the forms are equivariant in both.
With order statistics `R_(1) >= ... >= R_(m)`, excesses `e_j = R_(j) - R_(k)` and a spread `s` of the group, the optimal
weights give the rollout of rank j < k the advantage `a_j e_j + b_j e_j^2 / s`. Expectations are quadratures accurate to
better than 1e-6 (`functional.normal_tail`).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from tealightning.functional import normal_tail
from tealightning.functional.moments import centred, ratio_or_zero, root_mean_square
from tealightning.functional.normal_tail import DEFAULT, Resolution, TailScale, TiltNodes
from tealightning.functional.tail import expected_max_normal, tail_size, tail_statistics

_DRAWS = 1 << 17  # of the noise matrices; their error makes the coefficients less than optimal, never biased
_SEED = 20_260_510


@lru_cache(maxsize=1024)
def calibration_matrix(m: int, k: int, resolution: Resolution = DEFAULT) -> tuple[tuple[float, float], ...]:
    """Expected gradient of the two basis functions for standard normal R, each the mean over the group; 3 <= k <= m:

        [[E B1 R, E B2 R], [E B1 (R^2-1), E B2 (R^2-1)]]

        B1 = 1{top k} (R - r^),    B2 = 1{top k} ((R - mu^)^2 - (r^ - mu^)^2) / (2 sigma^)

    with `r^` the k-th largest of the m rewards, `mu^` and `sigma^` mean and population standard deviation of the k.

    >>> round(calibration_matrix(8, 4)[0][0], 3)
    0.375
    """
    matrix = np.zeros((2, 2))
    for r, weight in zip(*normal_tail.threshold_nodes(m, k, resolution.threshold), strict=True):
        one = normal_tail.tilted_excess(r, np.zeros(1), np.zeros(1), resolution.excess)
        e, p = one.excess[0], one.probability[0]
        x = r + e
        matrix[:, 0] += weight * ((k - 1) * np.array([(p * e * x).sum(), (p * e * (x * x - 1)).sum()]))
        matrix[:, 1] += weight * _quadratic_terms(r, k, resolution)
    return tuple(map(tuple, (matrix / m).tolist()))  # type: ignore[arg-type]


def _quadratic_terms(r: float, k: int, resolution: Resolution) -> np.ndarray:
    """`E[sum_j e_j (e_j - 2 e_mean)/(2 sigma) * (x_j, x_j^2 - 1) | r]`, where e_mean is over all k: [2].

    With g one of the scores, the sum is `sum_j e_j^2 g_j - (2/k) sum_l e_l sum_j e_j g_j`, and under a product of
    independent excesses its mean follows from one-excess moments.
    """
    n = k - 1
    nodes = normal_tail.std_nodes(r, n, resolution, members=k, below=0, with_threshold=True)
    one = normal_tail.tilted_excess(r, nodes.a, nodes.b, resolution.excess)
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
    """Coefficients `(a, b) = E(m, alpha)^-1 (1, c_N)` of the calibrated weights, E the calibration matrix over alpha.

    >>> [round(c, 3) for c in calibrated_coefficients(16, 128, 0.25)]
    [1.728, 8.416]
    """
    matrix = np.array(calibration_matrix(m, tail_size(alpha, m))) / alpha
    a, b = np.linalg.solve(matrix, [1.0, expected_max_normal(target_n)])
    return float(a), float(b)


def calibrated_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Calibrated weights of a top k >= 3, 0 for the others and for a tail without spread:

        (1/alpha) [a e + b e (e - 2 e_mean)/(2 sigma)]

    The Gaussian `functional.tail.tail_weights` with `calibrated_coefficients` in place of `(1, ct_N)`.

    >>> calibrated_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[-0.0000, -0.0000, -3.6408,  9.9167]], dtype=torch.float64)
    """
    a, b = calibrated_coefficients(rewards.shape[1], target_n, alpha)
    threshold, mean_excess, std, _ = tail_statistics(rewards, alpha)
    excess = (rewards - threshold).clamp(min=0)
    return excess * (a + 0.5 * b * ratio_or_zero(excess - 2 * mean_excess, std)) / alpha


class TailMoments(NamedTuple):
    """Moments of the p = 2(k-1) basis functions, the k - 1 linear ones first, for standard normal rewards."""

    signal: np.ndarray  # [2, p], E: mean contribution to the gradient in (location, log-scale)
    noise: np.ndarray  # [p, p], V: second moments of the contributions, summed over both directions
    unrelated: np.ndarray  # [p, p], Q: second moments in a direction that the reward does not depend on


def tail_moments(m: int, k: int, scale: TailScale) -> TailMoments:
    """All moments for one `(m, k, scale)`; a few seconds. `signal` by quadrature, the noise from seeded draws.

    >>> tail_moments(8, 3, "tail_rms").noise.shape
    (4, 4)
    """
    return TailMoments(signal_matrix(m, k, scale), *noise_matrices(m, k, scale))


def signal_matrix(m: int, k: int, scale: TailScale, resolution: Resolution = DEFAULT) -> np.ndarray:
    """Expected gradients `E` [2, 2(k-1)]: `E[e_j g_j]/m` and `E[e_j^2 g_j / s]/m` for the scores `g = R` and `R^2 - 1`.

    >>> signal_matrix(8, 3, "tail_rms").round(3)
    array([[0.2  , 0.05 , 0.26 , 0.036],
           [0.267, 0.018, 0.352, 0.017]])
    """
    n = k - 1
    signal = np.zeros((2, 2 * n))
    flat = TiltNodes(np.ones(1), np.zeros(1), np.zeros(1))
    for r, weight in zip(*normal_tail.threshold_nodes(m, k, resolution.threshold), strict=True):
        if scale == "tail_rms":
            nodes = normal_tail.rms_nodes(r, n, resolution)
        elif scale == "tail_std":
            nodes = normal_tail.std_nodes(r, n, resolution, members=n, below=0, with_threshold=False)
        else:
            nodes = normal_tail.std_nodes(r, n, resolution, members=m, below=m - k, with_threshold=True)
        signal[:, :n] += weight * _rank_means(r, n, flat, power=1, resolution=resolution)
        signal[:, n:] += weight * _rank_means(r, n, nodes, power=2, resolution=resolution)
    return signal / m


def _rank_means(r: float, n: int, nodes: TiltNodes, *, power: int, resolution: Resolution) -> np.ndarray:
    """`sum over nodes of E[e_(j)^power * (x, x^2 - 1)]` for the ranks j = 1..n of n tilted excesses: [2, n].

    The rank of an excess among the n is binomial given its cdf: `n * C(n-1, j-1) * (1-F)^(j-1) * F^(n-j)` is the
    density of rank j over that of one excess.
    """
    count = max(resolution.excess, math.ceil(12 * math.sqrt(n)))  # a rank's density narrows like 1/sqrt(n)
    one = normal_tail.tilted_excess(r, nodes.a, nodes.b, count)
    mass = nodes.weight * np.exp(n * one.log_mass)
    kept = mass > 1e-18 * mass.max()
    e = one.excess[kept]
    value = mass[kept, None] * one.probability[kept] * e**power
    x = r + e
    values = np.stack([(value * x).ravel(), (value * (x * x - 1)).ravel()])
    log_sf, log_cdf = one.log_sf[kept].ravel(), one.log_cdf[kept].ravel()
    means = np.empty((2, n))
    for j in range(1, n + 1):
        log_count = math.log(n) + gammaln(n) - gammaln(j) - gammaln(n - j + 1)
        means[:, j - 1] = values @ np.exp(log_count + (j - 1) * log_sf + (n - j) * log_cdf)
    return means


def noise_matrices(m: int, k: int, scale: TailScale, draws: int = _DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Noise matrices `V = E[sum over the two directions of G G^T]` and, for pairs of one rank only, `Q = E[F F^T]/m^2`.

    >>> noise, unrelated = noise_matrices(8, 3, "tail_rms", draws=1 << 14)
    >>> noise.shape
    (4, 4)
    """
    p = 2 * (k - 1)
    noise, unrelated = np.zeros((p, p)), np.zeros((p, p))
    generator = torch.Generator().manual_seed(_SEED)
    chunk = 1 << 14
    for _ in range(draws // chunk):
        rewards = torch.randn(chunk, m, dtype=torch.float64, generator=generator)
        top = rewards.topk(k, dim=1).values
        basis = torch.cat(rank_basis(rewards, top, scale), dim=1) / m
        scores = torch.cat([top[:, :-1], top[:, :-1]], dim=1)
        for score in (scores, scores.square() - 1):
            contribution = basis * score
            noise += (contribution.T @ contribution).numpy()
        unrelated += (basis.T @ basis).numpy()
    rank = np.arange(p) % (k - 1)
    return noise / draws, np.where(rank[:, None] == rank, unrelated, 0.0) / draws


def rank_basis(rewards: Tensor, top: Tensor, scale: TailScale) -> tuple[Tensor, Tensor]:
    """Basis functions `e_j` and `e_j^2 / s` of the ranks j = 1..k-1, best first: [P, k-1] each; 0 where `s` is 0.

    `top` [P, k] are the k largest, descending. `s` is the root mean square of the excesses (`tail_rms`), their standard
    deviation (`tail_std`), or that of the whole group (`group_std`), with divisor k - 1, k - 1 and m.

    >>> rewards = torch.tensor([[0.0, 1.0, 3.0, 4.0]], dtype=torch.float64)
    >>> rank_basis(rewards, rewards.topk(3).values, "tail_rms")
    (tensor([[3., 2.]], dtype=torch.float64), tensor([[3.5301, 1.5689]], dtype=torch.float64))
    """
    excess = (top - top[:, -1:])[:, :-1]
    members = excess if scale == "tail_rms" else centred(excess if scale == "tail_std" else rewards)
    spread = root_mean_square(members, members.shape[1])
    return excess, excess * ratio_or_zero(excess, spread)


def optimal_coefficients(moments: TailMoments, *, target_n: int, lam: float, scale_weight: float) -> np.ndarray:
    """Least noisy unbiased coefficients, [2, k-1], rows a and b:

        c = M^-1 E^T (E M^-1 E^T)^-1 (1, scale_weight c_N),     M = V + lam Q

    The minimum of the noise `c^T M c` over the exactly unbiased coefficients, those with `E c = (1, scale_weight c_N)`
    (Gauss-Markov).

    >>> moments = tail_moments(8, 3, "tail_rms")
    >>> optimal_coefficients(moments, target_n=16, lam=100, scale_weight=1).round(2)
    array([[-10.96, -27.97],
           [ 13.18,  31.84]])
    """
    target = np.array([1.0, scale_weight * expected_max_normal(target_n)])
    inverse = np.linalg.solve(moments.noise + lam * moments.unrelated, moments.signal.T)
    return (inverse @ np.linalg.solve(moments.signal @ inverse, target)).reshape(2, -1)


def optimal_weights(rewards: Tensor, coefficients: Tensor, scale: TailScale) -> Tensor:
    """Weights `a_j e_j + b_j e_j^2 / s` of the ranks j < k; 0 for the others and for groups where `s` is 0.

    `coefficients` are [2, k-1] float64, rows a and b, best rank first; for `scale` see `rank_basis`. Rollouts with
    equal rewards share the mean of what their ranks would get.

    >>> rewards = torch.tensor([[0.0, 1.0, 3.0, 4.0]], dtype=torch.float64)
    >>> optimal_weights(rewards, torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64), "tail_rms")
    tensor([[ 0.0000,  0.0000,  2.0000, 10.0602]], dtype=torch.float64)
    """
    top, index = rewards.topk(coefficients.shape[1] + 1, dim=1)
    excess, square = rank_basis(rewards, top, scale)
    a, b = coefficients.to(rewards.device)
    weights = (a * excess + b * square).masked_fill(top[:, :1] == top[:, -1:], 0.0)
    tied = (top[:, :-2] == top[:, 1:-1]).any(dim=1)
    if tied.any():
        weights[tied] = _averaged_over_ties(weights[tied], top[tied, :-1])
    return torch.zeros_like(rewards).scatter_(1, index[:, :-1], weights)


def _averaged_over_ties(weights: Tensor, values: Tensor) -> Tensor:
    """`weights` [P, n] with the mean over each run of equal `values` [P, n], sorted."""
    run = torch.cat([values.new_zeros(len(values), 1), (values.diff(dim=1) != 0).double()], dim=1).cumsum(1).long()
    total = torch.zeros_like(weights).scatter_add_(1, run, weights)
    count = torch.zeros_like(weights).scatter_add_(1, run, torch.ones_like(weights))
    return (total / count.clamp(min=1)).gather(1, run)
