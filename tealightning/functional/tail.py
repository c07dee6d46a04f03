"""Models of a reward's upper tail, each with the plug-in weights of its best-of-N, and the jackknife over prefixes.

- `gaussian`: the mean `mu_a` and the standard deviation `sigma_a` of the upper `alpha` part identify the tail, and
  `E[max of N] ~ mu_a + ct_N * sigma_a`. Source: Li, Qian, Mou, "What should post-training optimize? A test-time scaling
  law perspective" (arXiv 2605.10716).
- `gpd`: above the threshold r (the upper-alpha quantile) the excess is generalised Pareto with scale s and shape xi,

        V_N = E[max(R_1..R_N, r)] = r + s h(xi),   h(xi) = integral over y > 0 of [1 - (1 - alpha e^-y)^N] e^(xi y)

  and its mean and variance give `xi = (1 - q)/2` and `s = mean (1 + q)/2` with `q = mean^2 / variance`. A bounded tail
  has xi < 0, an exponential one xi = 0, a heavy one xi > 0.
- `empirical`: no model and no extrapolation, what the m samples can say.

Of a tail, `excess` is what a reward lies above the threshold (0 at and below it), `mean_excess` and `std` are mean and
population standard deviation of the excesses, [P, 1] float64.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.special import log_ndtr, ndtri
from torch import Tensor

from tealightning.functional.max_at_k import subset_shares, sum_of_gaps_below
from tealightning.functional.moments import ratio_or_zero, root_mean_square

_ROUNDING = 1e-9  # alpha * m this far above an integer is that integer (0.1 * 30 = 3.0000000000000004)


def tail_size(alpha: float, m: int) -> int:
    """Size of the tail, `k = ceil(alpha * m)`, at least 1, unharmed by float error.

    >>> tail_size(0.25, 16), tail_size(0.1, 30)
    (4, 3)
    """
    return max(1, math.ceil(alpha * m - _ROUNDING))


def smallest_group(alpha: float, k: int) -> int:
    """The smallest m whose tail has at least `k` rollouts.

    >>> smallest_group(0.25, 2)
    5
    """
    m = max(1, math.floor((k - 1) / alpha))
    while tail_size(alpha, m) < k:
        m += 1
    return m


@lru_cache(maxsize=1024)
def expected_max_normal(n: int) -> float:
    """Expected maximum `c_n` of n standard normals, accurate to about 1e-13.

        c_n = integral over x > 0 of 1 - Phi(x)^n - Phi(-x)^n

    by Gauss-Legendre quadrature up to where the integrand falls below float64.

    >>> round(expected_max_normal(2), 6)  # 1/sqrt(pi)
    0.56419
    """
    upper = math.sqrt(2 * (math.log(n) + 40))
    nodes, weights = _legendre(400)
    x = (nodes + 1) * upper / 2
    integrand = -np.expm1(n * log_ndtr(x)) - np.exp(n * log_ndtr(-x))
    return float(np.dot(weights, integrand) * upper / 2)


_legendre = lru_cache(np.polynomial.legendre.leggauss)


class TailConstants(NamedTuple):
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
    mean_excess: Tensor
    std: Tensor
    k: Tensor  # int64


def tail_statistics(rewards: Tensor, alpha: float, valid: Tensor | None = None) -> TailStatistics:
    """Threshold, mean excess and standard deviation of each prompt's top `k = ceil(alpha * M)` valid rewards.

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


def extrapolated_best_of_n(
    rewards: Tensor, ns: Sequence[int], *, alpha: float = 0.25, valid: Tensor | None = None
) -> Tensor:
    """Extrapolate best-of-n beyond the sample, `mu_a + ct_n * sigma_a`, right if the upper tail is Gaussian.

    A plug-in, biased low by O(1/M); never to be reported under the name of a measured value. [P, len(ns)] float64, NaN
    where the tail has fewer than 2 samples.

    >>> extrapolated_best_of_n(torch.tensor([[0.0, 1.0, 2.0, 4.0]]), [8, 64], alpha=0.5)
    tensor([[4.0380, 5.5644]], dtype=torch.float64)
    """
    tail = tail_statistics(rewards, alpha, valid)
    ct = torch.tensor([tail_constants(n, alpha).ct_n for n in ns], dtype=torch.float64, device=rewards.device)
    return (tail.threshold + tail.mean_excess + ct * tail.std).masked_fill(tail.k < 2, float("nan"))


TailModel = Literal["gaussian", "gpd", "empirical"]
TAIL_MODELS: tuple[TailModel, ...] = ("gaussian", "gpd", "empirical")


def tail_weights(rewards: Tensor, *, target_n: int, alpha: float, tail: TailModel) -> Tensor:
    """Plug-in weights of the gradient of E[max of N] from the group's own tail; 0 below it and for a constant tail.

    Gaussian: `gaussian_influence` of the excesses. Ties at the threshold weigh 0 whichever of them count as top k.
    `sigma = 0` (which includes k = 1) gives zeros, and with k = 2 the quadratic term vanishes.

    >>> tail_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75, tail="gaussian")
    tensor([[-0.0000, -0.0000, 0.1151, 4.7309]], dtype=torch.float64)
    """
    if tail == "empirical":
        return empirical_weights(rewards, target_n=target_n, alpha=alpha)
    if tail == "gpd":
        return gpd_weights(rewards, target_n=target_n, alpha=alpha)
    threshold, mean_excess, std, _ = tail_statistics(rewards, alpha)
    return gaussian_influence((rewards - threshold).clamp(min=0), mean_excess, std, target_n=target_n, alpha=alpha)


def gaussian_influence(excess: Tensor, mean_excess: Tensor, std: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Influence function of `mu_a + ct_N sigma_a` at a reward, 0 at and below the threshold.

    With `e = u - r` the excess of the reward u over the threshold r,

        w(u) = (1/alpha) [ e + ct_N/(2 sigma) ((u - mu)^2 - (r - mu)^2) ]
             = (e/alpha) [ 1 + ct_N (e - 2 e_mean)/(2 sigma) ]

    It is negative between the threshold and about the tail mean: those rollouts hold the spread back.

    >>> excess, mean, std = torch.tensor([[[0.0]], [[1.0]], [[1.0]]], dtype=torch.float64)
    >>> gaussian_influence(excess + 3, mean, std, target_n=8, alpha=0.5)
    tensor([[9.1140]], dtype=torch.float64)
    """
    curvature = ratio_or_zero(excess - 2 * mean_excess, std)
    return excess * (1 + 0.5 * tail_constants(target_n, alpha).ct_n * curvature) / alpha


LOWEST_SHAPE, HIGHEST_SHAPE = -1.0, 0.25
"""The weights are quadratic in the excess: their variance needs its fourth moment, which exists for xi < 1/4. Below -1
the density would be infinite at the end point of the tail (-1 is the uniform distribution)."""

_MIDDLE, _HALF = (HIGHEST_SHAPE + LOWEST_SHAPE) / 2, (HIGHEST_SHAPE - LOWEST_SHAPE) / 2
_AT_THE_LIMIT = 1e-9
_DEGREE = 48


@lru_cache(maxsize=256)
def _chebyshev(target_n: int, alpha: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Chebyshev coefficients of h and h' on the interval of shapes."""
    upper = (math.log(max(target_n * alpha, 1.0)) + 40) / (1 - HIGHEST_SHAPE)
    x, w = _legendre(600)
    y, w = (x + 1) * upper / 2, w * upper / 2
    with np.errstate(divide="ignore"):
        reached = -np.expm1(target_n * np.log1p(-alpha * np.exp(-y)))

    def h(unit: np.ndarray) -> np.ndarray:
        return np.exp((_MIDDLE + _HALF * unit)[:, None] * y) @ (reached * w)

    coefficients: np.ndarray = chebyshev.chebinterpolate(h, _DEGREE)  # type: ignore[type-var]
    return tuple(coefficients.tolist()), tuple((chebyshev.chebder(coefficients) / _HALF).tolist())


def expected_max_gpd(shape: Tensor, *, target_n: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Expected maximum `h(xi)` at scale 1 and its derivative, for shapes within the limits; accurate to about 1e-12.

    >>> expected_max_gpd(torch.tensor([0.0], dtype=torch.float64), target_n=8, alpha=0.5)
    (tensor([2.0251], dtype=torch.float64), tensor([2.8134], dtype=torch.float64))
    """
    unit = (2 * shape - (HIGHEST_SHAPE + LOWEST_SHAPE)) / (HIGHEST_SHAPE - LOWEST_SHAPE)
    value, slope = _chebyshev(target_n, alpha)
    return _clenshaw(value, unit), _clenshaw(slope, unit)


def _clenshaw(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Sum of Chebyshev polynomials at x."""
    later, last = torch.zeros_like(x), torch.zeros_like(x)
    for c in reversed(coefficients[1:]):
        later, last = c + 2 * x * later - last, later
    return coefficients[0] + x * later - last


def gpd_influence(
    excess: Tensor, in_tail: Tensor, mean_excess: Tensor, std: Tensor, *, target_n: int, alpha: float
) -> Tensor:
    """Influence function of `r + s h(xi)` at a reward, 0 below the threshold.

    With `G = s h(xi)` a function of mean and variance v of the excess e, and the density `alpha/s` of the model at r,

        w(u) = (1/alpha) [ G_mean e + G_v (e^2 - 2 mean e) + (1 - G_mean) s ]     for u >= r
        G_mean = ((1 + 3q) h - q (1 + q) h')/2,     G_v v = (q mean/2) ((1 + q) h'/2 - h)

    The last term is the threshold's own: a reward above r raises the quantile. Where the shape is clipped, `G_v = 0`
    and `G_mean = (1 - xi) h`. `in_tail` [P, m] is 1 for a member of the tail, 0 for others, a share for ties at r.

    >>> excess, inside, mean, std = torch.ones(4, 1, 1, dtype=torch.float64)
    >>> gpd_influence(excess, inside, mean, std, target_n=8, alpha=0.5)
    tensor([[1.2117]], dtype=torch.float64)
    """
    ratio = ratio_or_zero(mean_excess, std).clamp(max=1e6)  # far beyond the lowest shape it is clipped anyway
    q = ratio.square()
    free = (1 - q) / 2
    shape = free.clamp(LOWEST_SHAPE, HIGHEST_SHAPE)
    # Ties put samples exactly on a limit (one positive excess of three: xi = 1/4); rounding must not choose their side.
    clipped = (free - _MIDDLE).abs() > _HALF - _AT_THE_LIMIT
    h, slope = expected_max_gpd(shape, target_n=target_n, alpha=alpha)
    scale = mean_excess * (1 - shape)
    by_mean = torch.where(clipped, (1 - shape) * h, 0.5 * ((1 + 3 * q) * h - q * (1 + q) * slope))
    by_variance = (0.5 * q * mean_excess * (0.5 * (1 + q) * slope - h)).masked_fill(clipped, 0.0)
    quadratic = by_variance * ratio_or_zero(excess, std) * ratio_or_zero(excess - 2 * mean_excess, std)
    weights = (by_mean * excess + quadratic + (1 - by_mean) * scale * in_tail) / alpha
    return weights.masked_fill(std == 0, 0.0)


def gpd_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """`gpd_influence` with the group's own tail; rewards tied at the threshold share the places left for them.

    >>> gpd_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[ 0.0000, -0.0279,  0.0600,  4.7896]], dtype=torch.float64)
    """
    tail = tail_statistics(rewards, alpha)
    above, at = rewards > tail.threshold, rewards == tail.threshold
    share = (tail.k - above.sum(1, keepdim=True)) / at.sum(1, keepdim=True)
    excess = (rewards - tail.threshold).clamp(min=0)
    return gpd_influence(excess, above + at * share, tail.mean_excess, tail.std, target_n=target_n, alpha=alpha)


def empirical_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Weights without a tail model, summed over the gaps above the threshold and below i, with n = min(N, m):

        A_(i) = sum_l (R_(l+1) - R_(l)) * m C(l, n-1)/C(m, n)

    The exact influence function of `E[max of N]` is `w(u) = integral up to u of N F(x)^(N-1) dx`. Here `N F^(N-1)` is
    replaced by its unbiased estimate in each gap between neighbouring rewards, for the largest budget that m samples
    can measure, and gaps below the k-th largest reward, where `N F^(N-1)` is below `N (1-alpha)^(N-1)`, are left out.
    With `alpha = 1` and N <= m these are the weights of max@N (`functional.max_at_k.max_at_k_loo_weights`).

    >>> empirical_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[0., 0., 0., 8.]], dtype=torch.float64)
    """
    m = rewards.shape[-1]
    shares = subset_shares(m, min(target_n, m))[1:]
    return sum_of_gaps_below(rewards, shares * (torch.arange(m - 1) >= m - tail_size(alpha, m)))


def prefix_sizes(m: int, num_prefixes: int) -> tuple[int, ...]:
    """Prefix sizes `round(j * m / num_prefixes)`, j = 1..num_prefixes: strictly growing up to m >= num_prefixes.

    >>> prefix_sizes(16, 4)
    (4, 8, 12, 16)
    """
    return tuple(round(j * m / num_prefixes) for j in range(1, num_prefixes + 1))


@lru_cache(maxsize=1024)
def jackknife_weights(sizes: tuple[int, ...], order: int) -> tuple[float, ...]:
    """Minimum-norm weights v over prefix sizes P_1 < ... < P_J that cancel powers of 1/P in the bias:

        sum_j v_j = 1,     sum_j v_j P_j^-s = 0 for s = 1..order-1,     order <= J

    (generalised jackknife, Schucany, Gray and Owen 1971).

    >>> [round(weight, 3) for weight in jackknife_weights((8, 16), 2)]
    [-1.0, 2.0]
    """
    inverse = sizes[-1] / np.array(sizes, dtype=np.float64)
    conditions = inverse ** np.arange(order)[:, None]
    return tuple(np.linalg.lstsq(conditions, np.eye(order)[0], rcond=None)[0].tolist())


def prefix_weights(
    rewards: Tensor, plug_in: Callable[[Tensor], Tensor], *, num_prefixes: int, order: int, rotations: int
) -> Tensor:
    """Jackknife of `plug_in` weights [P, size] -> [P, size] over prefixes of the group, averaged over rotations:

        A_i = sum_j v_j (m/P_j) 1{i < P_j} plug_in_i(first P_j rollouts)

    Rotation r of R starts the order at rollout `r*m // R`: the same expectation with less variance.

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
