"""Other tails than the Gaussian: generalised Pareto and empirical, each with the plug-in weights of its best-of-N.

Above the threshold r (the upper-alpha quantile) let the excess be generalised Pareto with scale s and shape xi. Then

    V_N = E[max(R_1..R_N, r)] = r + s h(xi),     h(xi) = integral over y > 0 of [1 - (1 - alpha e^-y)^N] e^(xi y)

and mean and variance of the excess give `xi = (1 - q)/2` and `s = mean (1 + q)/2` with `q = mean^2 / variance`.
A bounded tail has xi < 0, an exponential one xi = 0, a heavy one xi > 0.

- `gaussian`: the upper tail is Gaussian (`functional.tail`);
- `gpd`: it is generalised Pareto, with a shape of its own (`functional.gpd_tail`);
- `empirical`: no model and no extrapolation, what the m samples can say (here).
"""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from tealightning.functional.max_at_k import gaps_and_ranks, subset_shares
from tealightning.functional.moments import ratio_or_zero
from tealightning.functional.tail import direct_weights, tail_size, tail_statistics

LOWEST_SHAPE, HIGHEST_SHAPE = -1.0, 0.25
"""The weights are quadratic in the excess: their variance needs its fourth moment, which exists for xi < 1/4. Below -1
the density would be infinite at the end point of the tail (-1 is the uniform distribution)."""

_AT_THE_LIMIT = 1e-9
_DEGREE = 48


@lru_cache(maxsize=256)
def _chebyshev(target_n: int, alpha: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Chebyshev coefficients of h and h' on the interval of shapes."""
    middle, half = (HIGHEST_SHAPE + LOWEST_SHAPE) / 2, (HIGHEST_SHAPE - LOWEST_SHAPE) / 2
    upper = (math.log(max(target_n * alpha, 1.0)) + 40) / (1 - HIGHEST_SHAPE)
    x, w = np.polynomial.legendre.leggauss(600)
    y, w = (x + 1) * upper / 2, w * upper / 2
    with np.errstate(divide="ignore"):
        reached = -np.expm1(target_n * np.log1p(-alpha * np.exp(-y)))

    def h(unit: np.ndarray) -> np.ndarray:
        return np.exp((middle + half * unit)[:, None] * y) @ (reached * w)

    coefficients: np.ndarray = chebyshev.chebinterpolate(h, _DEGREE)  # type: ignore[type-var]
    return tuple(coefficients.tolist()), tuple((chebyshev.chebder(coefficients) / half).tolist())


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


def _gpd_shape(mean_excess: Tensor, std: Tensor) -> Tensor:
    """`(1 - mean^2/variance)/2` by moments of the excess, not clipped; -inf without spread."""
    return (1 - (mean_excess / std).square()) / 2


def gpd_best_of_n(mean_excess: Tensor, std: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Expected excess `s h(xi)` of the best of N over the threshold; shapes beyond the limits are clipped.

    A clipped shape fixes xi, and the scale then follows from the mean alone, `s = mean (1 - xi)`.

    >>> mean, std = torch.ones(2, 1, 1, dtype=torch.float64)
    >>> gpd_best_of_n(mean, std, target_n=8, alpha=0.5)  # an exponential tail
    tensor([[2.0251]], dtype=torch.float64)
    """
    shape = _gpd_shape(mean_excess, std).clamp(LOWEST_SHAPE, HIGHEST_SHAPE)
    return mean_excess * (1 - shape) * expected_max_gpd(shape, target_n=target_n, alpha=alpha)[0]


def gpd_influence(
    excess: Tensor, in_tail: Tensor, mean_excess: Tensor, std: Tensor, *, target_n: int, alpha: float
) -> Tensor:
    """Influence function of `r + s h(xi)` at a reward, 0 below the threshold.

    With `G = s h(xi)` a function of mean and variance v of the excess e, and the density `alpha/s` of the model at r,

        w(u) = (1/alpha) [ G_mean e + G_v (e^2 - 2 mean e) + (1 - G_mean) s ]     for u >= r
        G_mean = ((1 + 3q) h - q (1 + q) h')/2,     G_v v = (q mean/2) ((1 + q) h'/2 - h)

    The last term is the threshold's own: a reward above r raises the quantile. Where the shape is clipped, `G_v = 0`
    and `G_mean = (1 - xi) h`.

    Args:
        excess: [P, m] float64, 0 at and below the threshold.
        in_tail: [P, m] float64, 1 for a member of the tail, 0 for others, a share for ties at the threshold.
        mean_excess: [P, 1].
        std: [P, 1], population standard deviation of the excess.

    >>> excess, inside, mean, std = torch.ones(4, 1, 1, dtype=torch.float64)
    >>> gpd_influence(excess, inside, mean, std, target_n=8, alpha=0.5)
    tensor([[1.2117]], dtype=torch.float64)
    """
    ratio = ratio_or_zero(mean_excess, std).clamp(max=1e6)  # far beyond the lowest shape it is clipped anyway
    q = ratio.square()
    free = (1 - q) / 2
    shape = free.clamp(LOWEST_SHAPE, HIGHEST_SHAPE)
    # Ties put samples exactly on a limit (one positive excess of three: xi = 1/4); rounding must not choose their side.
    clipped = (free - (HIGHEST_SHAPE + LOWEST_SHAPE) / 2).abs() > (HIGHEST_SHAPE - LOWEST_SHAPE) / 2 - _AT_THE_LIMIT
    h, slope = expected_max_gpd(shape, target_n=target_n, alpha=alpha)
    scale = mean_excess * (1 - shape)
    by_mean = torch.where(clipped, (1 - shape) * h, 0.5 * ((1 + 3 * q) * h - q * (1 + q) * slope))
    by_variance = (0.5 * q * mean_excess * (0.5 * (1 + q) * slope - h)).masked_fill(clipped, 0.0)
    quadratic = by_variance * ratio_or_zero(excess, std) * ratio_or_zero(excess - 2 * mean_excess, std)
    weights = (by_mean * excess + quadratic + (1 - by_mean) * scale * in_tail) / alpha
    return weights.masked_fill(std == 0, 0.0)


def gpd_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """Plug-in weights of the generalised Pareto tail: `gpd_influence` with the group's own tail.

    Rewards tied at the threshold share the places in the tail that are left for them.

    Args:
        rewards: [P, m] float64, finite.

    Returns:
        [P, m] float64; zeros where the tail has no spread.

    >>> gpd_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75)
    tensor([[ 0.0000, -0.0279,  0.0600,  4.7896]], dtype=torch.float64)
    """
    tail = tail_statistics(rewards, alpha)
    above, at = rewards > tail.threshold, rewards == tail.threshold
    share = (tail.k - above.sum(1, keepdim=True)) / at.sum(1, keepdim=True)
    in_tail = above + at * share
    excess = (rewards - tail.threshold).clamp(min=0)
    return gpd_influence(excess, in_tail, tail.mean_excess, tail.std, target_n=target_n, alpha=alpha)


TailModel = Literal["gaussian", "gpd", "empirical"]

TAIL_MODELS: tuple[TailModel, ...] = ("gaussian", "gpd", "empirical")


def tail_weights(rewards: Tensor, *, target_n: int, alpha: float, tail: TailModel) -> Tensor:
    """Plug-in weights of the gradient of E[max of N] from the top `k = ceil(alpha m)` rollouts; 0 for the others.

    Args:
        rewards: [P, m] float64, finite.
        target_n: N of the objective.
        alpha: Upper-tail level in (0, 1].
        tail: Model of the tail.

    Returns:
        [P, m] float64; zeros where the tail has no spread.

    >>> tail_weights(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), target_n=8, alpha=0.75, tail="gaussian")
    tensor([[-0.0000, -0.0000, 0.1151, 4.7309]], dtype=torch.float64)
    """
    weights = {"gaussian": direct_weights, "gpd": gpd_weights, "empirical": empirical_weights}[tail]
    return weights(rewards, target_n=target_n, alpha=alpha)


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
    gaps, rank = gaps_and_ranks(rewards)
    shares = subset_shares(m, min(target_n, m))[1:].to(rewards.device)
    counted = torch.arange(m - 1, device=rewards.device) >= m - tail_size(alpha, m)
    below = (gaps * shares * counted).cumsum(-1)
    return torch.cat([below.new_zeros(len(below), 1), below], dim=-1).gather(-1, rank)
