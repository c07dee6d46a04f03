"""The least noisy of the exactly unbiased tail estimators: every rank of the tail has coefficients of its own.

With order statistics `R_(1) >= ... >= R_(m)`, excesses `e_j = R_(j) - R_(k)` and a spread `s` of the group, the
rollout of rank j < k gets `a_j e_j + b_j e_j^2 / s`. The coefficients are found for standard normal rewards; location
and scale of the rewards do not matter, because the form is equivariant in both.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from tealightning.functional.moments import centred, ratio_or_zero, root_mean_square
from tealightning.functional.normal_tail import (
    DEFAULT,
    Resolution,
    TailScale,
    TiltNodes,
    rms_nodes,
    std_nodes,
    threshold_nodes,
    tilted_excess,
)
from tealightning.functional.tail import expected_max_normal

_DRAWS = 1 << 17  # of the noise matrices; their error makes the coefficients less than optimal, never biased
_SEED = 20_260_510


@dataclass(frozen=True, kw_only=True, slots=True)
class TailMoments:
    """Moments of the 2(k-1) basis functions, the k - 1 linear ones first, for standard normal rewards."""

    signal: np.ndarray  # [2, p], E: mean contribution to the gradient in (location, log-scale)
    noise: np.ndarray  # [p, p], V: second moments of the contributions, summed over both directions
    unrelated: np.ndarray  # [p, p], Q: second moments in a direction that the reward does not depend on


def min_tail(scale: TailScale) -> int:
    """Smallest k for which `s` says anything and `E[1/s^2]` exists: 3, and 5 for `tail_std`, which is a standard
    deviation of k - 1 values and can be arbitrarily small beside them.

    >>> min_tail("tail_rms"), min_tail("tail_std")
    (3, 5)
    """
    return 5 if scale == "tail_std" else 3


def tail_moments(m: int, k: int, scale: TailScale) -> TailMoments:
    """All moments for one `(m, k, scale)`; a few seconds. `signal` by quadrature, the noise from seeded draws.

    >>> tail_moments(8, 3, "tail_rms").noise.shape
    (4, 4)
    """
    noise, unrelated = noise_matrices(m, k, scale)
    return TailMoments(signal=signal_matrix(m, k, scale), noise=noise, unrelated=unrelated)


def signal_matrix(m: int, k: int, scale: TailScale, resolution: Resolution = DEFAULT) -> np.ndarray:
    """Expected gradients `E` [2, 2(k-1)]: `E[e_j g_j]/m` and `E[e_j^2 g_j / s]/m` for the scores `g = R` and `R^2 - 1`.

    Deterministic; accurate to better than 1e-6 (see `functional.normal_tail`).

    >>> signal_matrix(8, 3, "tail_rms").round(3)
    array([[0.2  , 0.05 , 0.26 , 0.036],
           [0.267, 0.018, 0.352, 0.017]])
    """
    n = k - 1
    signal = np.zeros((2, 2 * n))
    for r, weight in zip(*threshold_nodes(m, k, resolution.threshold), strict=True):
        flat = TiltNodes(np.ones(1), np.zeros(1), np.zeros(1))
        signal[:, :n] += weight * _rank_means(r, n, flat, power=1, resolution=resolution)
        signal[:, n:] += weight * _rank_means(r, n, _nodes(r, m, k, scale, resolution), power=2, resolution=resolution)
    return signal / m


def _nodes(r: float, m: int, k: int, scale: TailScale, resolution: Resolution) -> TiltNodes:
    """Nodes that integrate `1/s` for the given spread."""
    n = k - 1
    if scale == "tail_rms":
        return rms_nodes(r, n, resolution)
    if scale == "tail_std":
        return std_nodes(r, n, resolution, members=n, below=0, with_threshold=False)
    return std_nodes(r, n, resolution, members=m, below=m - k, with_threshold=True)


def _rank_means(r: float, n: int, nodes: TiltNodes, *, power: int, resolution: Resolution) -> np.ndarray:
    """`sum over nodes of E[e_(j)^power * (x, x^2 - 1)]` for the ranks j = 1..n of n tilted excesses: [2, n].

    The rank of an excess among the n is binomial given its cdf: `n * C(n-1, j-1) * (1-F)^(j-1) * F^(n-j)` is the
    density of rank j over that of one excess.
    """
    count = max(resolution.excess, math.ceil(12 * math.sqrt(n)))  # a rank's density narrows like 1/sqrt(n)
    one = tilted_excess(r, nodes.a, nodes.b, count)
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

    Args:
        rewards: [P, m] float64.
        top: [P, k] float64, its k largest, descending.
        scale: `tail_rms`: root mean square of the excesses; `tail_std`: their population standard deviation;
            `group_std`: that of the whole group.

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

    The minimum of the noise `c^T M c` over the coefficients with `E c = (1, scale_weight c_N)`, that is over the
    exactly unbiased ones (Gauss-Markov). The noise matrices decide how noisy it is, never the mean.

    >>> moments = tail_moments(8, 3, "tail_rms")
    >>> optimal_coefficients(moments, target_n=16, lam=100, scale_weight=1).round(2)
    array([[-10.96, -27.97],
           [ 13.18,  31.84]])
    """
    target = np.array([1.0, scale_weight * expected_max_normal(target_n)])
    inverse = np.linalg.solve(moments.noise + lam * moments.unrelated, moments.signal.T)
    return (inverse @ np.linalg.solve(moments.signal @ inverse, target)).reshape(2, -1)


def optimal_weights(rewards: Tensor, coefficients: Tensor, scale: TailScale) -> Tensor:
    """Weights of the ranks j < k; the other rollouts get 0, and so do groups where `s` is 0:

        a_j e_j + b_j e_j^2 / s

    Rollouts with equal rewards share the mean of what their ranks would get.

    Args:
        rewards: [P, m] float64, finite.
        coefficients: [2, k-1] float64, rows a and b, best rank first.
        scale: What `s` is, see `rank_basis`.

    Returns:
        [P, m] float64.

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
