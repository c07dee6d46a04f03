"""Exact expectations over the upper tail of a standard normal sample, by deterministic quadrature.

What the unbiased tail estimators are calibrated with: for m standard normal rewards with order statistics
`R_(1) >= ... >= R_(m)` and excesses `e_j = R_(j) - R_(k)` over the k-th, expectations such as `E[e_j^2 R_(j) / s]`
with a spread `s` of the group in the denominator. Three facts make them sums of products of one-dimensional integrals:

- given the threshold `r = R_(k)`, the n = k - 1 excesses are independent, with density `phi(r + e)/Phi(-r)`, and so
  are the m - k rewards below;
- `1/s = (2/sqrt(pi)) * integral over t > 0 of exp(-t^2 s^2)`;
- if `s` is a standard deviation of w values, `exp(-t^2 s^2) = (t/sqrt(pi)) * integral over c of exp(-(t^2/w) sum (x_i
  - c)^2)` (a Hubbard-Stratonovich transform), a product over the values; a root mean square needs no c.

Under such a product a normal density stays a normal density, so every factor is a truncated normal one. Integrals over
r, t, c and the excess are Gauss-Legendre sums on windows outside of which the integrand has fallen by exp(-40).
`tests/functional/test_normal_tail.py` shows the accuracy: better than 1e-6.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import gammaln, log_ndtr

TailScale = Literal["tail_rms", "tail_std", "group_std"]
Array = np.ndarray

_NEGLIGIBLE = 40.0  # where the logarithm of an integrand is this far below its maximum, the integrand is 0


class Resolution(NamedTuple):
    """Nodes in each dimension."""

    threshold: int = 48
    t: int = 40
    centre: int = 40
    excess: int = 48


DEFAULT = Resolution()


@lru_cache(maxsize=32)
def _unit_nodes(count: int) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return (x + 1) / 2, w / 2


def _window(log_density: Array, grid: Array) -> tuple[Array, Array]:
    """Ends of the part of `grid` [..., g] where `log_density` [..., g], with a single peak, is not negligible."""
    kept = log_density > log_density.max(-1, keepdims=True) - _NEGLIGIBLE
    last = grid.shape[-1] - 1
    first_kept = np.maximum(kept.argmax(-1) - 1, 0)
    last_kept = np.minimum(last - kept[..., ::-1].argmax(-1) + 1, last)
    low, high = (np.take_along_axis(grid, end[..., None], -1)[..., 0] for end in (first_kept, last_kept))
    return low, high


def threshold_nodes(m: int, k: int, count: int) -> tuple[Array, Array]:
    """Nodes r and weights of `E[f(R_(k))]` for the k-th largest of m standard normals: [count] each.

    >>> r, weight = threshold_nodes(4, 1, 48)
    >>> round(float(weight @ r), 4)  # expected maximum of 4
    1.0294
    """

    def log_density(r: Array) -> Array:
        constant = gammaln(m + 1) - gammaln(k) - gammaln(m - k + 1) - 0.5 * math.log(2 * math.pi)
        return constant - r * r / 2 + (k - 1) * log_ndtr(-r) + (m - k) * log_ndtr(r)

    grid = np.linspace(-12, 12, 4801)
    low, high = _window(log_density(grid), grid)
    x, w = _unit_nodes(count)
    r = low + (high - low) * x
    return r, (high - low) * w * np.exp(log_density(r))


class Tilted(NamedTuple):
    """One excess under the density `phi(r + e)/Phi(-r)` times `exp(-a (r + e - b)^2)`, for arrays of (a, b)."""

    log_mass: Array  # [...], of the tilted density
    excess: Array  # [..., nodes]
    probability: Array  # [..., nodes], weights that sum to 1
    log_cdf: Array  # [..., nodes], of the normalised density
    log_sf: Array  # [..., nodes]


def _tilt(r: float, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Root of the precision and end point beta of the tilted normal, and the logarithm of its factor."""
    precision = 1 + 2 * a
    root = np.sqrt(precision)
    beta = (r - 2 * a * b / precision) * root
    return root, beta, -a * b * b / precision - 0.5 * np.log(precision)


def tilted_excess(r: float, a: Array, b: Array, count: int) -> Tilted:
    """Nodes for one excess over r, tilted; `a >= 0` and `b` are arrays of one shape.

    >>> one = tilted_excess(0.0, np.zeros(1), np.zeros(1), 48)
    >>> round(float((one.probability * one.excess).sum()), 4)  # sqrt(2/pi)
    0.7979
    """
    root, beta, log_factor = _tilt(r, a, b)
    log_tail = log_ndtr(-beta)
    low = np.maximum(beta, -9.0)
    high = np.sqrt(np.maximum(beta, 0.0) ** 2 + 2 * _NEGLIGIBLE)
    x, w = _unit_nodes(count)
    y = low[..., None] + (high - low)[..., None] * x
    log_sf = log_ndtr(-y) - log_tail[..., None]
    log_pdf = -0.5 * y * y - 0.5 * math.log(2 * math.pi) - log_tail[..., None]
    probability = np.exp(log_pdf) * w * (high - low)[..., None]
    log_cdf = np.log(-np.expm1(np.minimum(log_sf, -1e-300)))
    excess = (y - beta[..., None]) / root[..., None]
    return Tilted(log_factor + log_tail - log_ndtr(-r), excess, probability, log_cdf, log_sf)


def _log_mass(r: float, a: Array, b: Array, side: int) -> Array:
    """Logarithm of `E[exp(-a (x - b)^2)]` for a standard normal x above r (side -1) or below it (side 1)."""
    _, beta, log_factor = _tilt(r, a, b)
    return log_factor + log_ndtr(side * beta) - log_ndtr(side * r)


class TiltNodes(NamedTuple):
    """Nodes over (t, c) for one threshold: `E[P/s | r] = sum weight * E_tilted[P] * exp(n * log_mass)`."""

    weight: Array  # [nodes], with every factor but the masses of the n excesses
    a: Array  # [nodes]
    b: Array  # [nodes], centre in units of rewards


def _t_nodes(count: int) -> tuple[Array, Array]:
    """Nodes and weights of `(2/sqrt(pi)) * integral over t > 0`, as many below 1.5 as above it."""
    x, w = _unit_nodes(count)
    return 1.5 * x / (1 - x), 2 / math.sqrt(math.pi) * w * 1.5 / (1 - x) ** 2


def rms_nodes(r: float, n: int, resolution: Resolution) -> TiltNodes:
    """Nodes for `s` = root mean square of the n excesses.

    >>> rms_nodes(0.0, 3, DEFAULT).weight.shape
    (40,)
    """
    t, weight = _t_nodes(resolution.t)
    return TiltNodes(weight, t * t / n, np.full_like(t, r))


def std_nodes(r: float, n: int, resolution: Resolution, *, members: int, below: int, with_threshold: bool) -> TiltNodes:
    """Nodes for `s` = population standard deviation of `members` values: the n excesses, the threshold if asked for,
    and `below` rewards under it.

    >>> std_nodes(0.0, 3, DEFAULT, members=4, below=0, with_threshold=True).weight.shape
    (1600,)
    """
    t, t_weight = _t_nodes(resolution.t)
    a = t * t / members

    def log_product(a: Array, b: Array) -> Array:
        total = n * _log_mass(r, a, b, -1)
        if with_threshold:
            total = total - a * (r - b) ** 2
        return total + below * _log_mass(r, a, b, 1) if below else total

    reach = 14 + 14 / t  # around r: rewards spread over less than 14, and their mean is known to about 1/t
    grid = r + np.linspace(-1, 1, 801) ** 3 * reach[:, None]  # finer near r, where large t looks
    low, high = _window(log_product(np.broadcast_to(a[:, None], grid.shape), grid), grid)
    x, w = _unit_nodes(resolution.centre)
    b = low[:, None] + (high - low)[:, None] * x
    a = np.broadcast_to(a[:, None], b.shape)
    weight = (t_weight * t / math.sqrt(math.pi) * (high - low))[:, None] * w
    others = np.exp(log_product(a, b) - n * _log_mass(r, a, b, -1))
    return TiltNodes((weight * others).ravel(), a.ravel(), b.ravel())
