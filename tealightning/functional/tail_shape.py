"""Shape of a sample's upper tail: clusters, QQ linearity and the generalised Pareto shape.

Each comes with the values that Gaussian samples of the same size have.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln, log_ndtr
from torch import Tensor

from tealightning.functional.moments import centred, ratio_or_zero
from tealightning.functional.statistics import mean_over_prompts

SMALLEST_CLUSTER = 3
"""Fewer samples are outliers, not a cluster."""


def largest_atom(values: Tensor) -> Tensor:
    """Share of each row that has the row's most frequent value, [Q] float64; 0 where all values differ.

    Args:
        values: [Q, k] float64.

    >>> largest_atom(torch.tensor([[1.0, 1.0, 2.0, 3.0]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """
    ordered = values.sort(dim=1).values.contiguous()
    copies = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    return copies.masked_fill(copies == 1, 0).double().amax(dim=1) / values.shape[1]


def two_cluster_share(values: Tensor) -> Tensor:
    """Share of each row's variance that lies between two clusters, at the cut between neighbours that makes it largest.

        max over n of  n (k - n)/k * (mean of the n lowest - mean of the others)^2 / sum of squares,   3 <= n <= k - 3

    1 for two points; 0.64 for a Gaussian, 0.75 for a uniform distribution.

    Args:
        values: [Q, k] float64.

    Returns:
        [Q] float64; NaN without spread, and for k < 6.

    >>> two_cluster_share(torch.tensor([[0.0, 0, 0, 1, 1, 1]], dtype=torch.float64))
    tensor([1.], dtype=torch.float64)
    """
    size = values.shape[1]
    if size < 2 * SMALLEST_CLUSTER:
        return values.new_full((len(values),), float("nan"))
    deviations = centred(values.sort(dim=1).values)
    deviations = ratio_or_zero(deviations, deviations.abs().amax(dim=1, keepdim=True))  # squares stay in range
    count = torch.arange(1, size + 1, dtype=values.dtype, device=values.device)
    between = deviations.cumsum(dim=1).square() * size / (count * (size - count).clamp(min=1))
    total = deviations.square().sum(dim=1)
    largest = between[:, SMALLEST_CLUSTER - 1 : size - SMALLEST_CLUSTER].amax(dim=1)
    return largest / total.masked_fill(total == 0, float("nan"))


_SEED = 20_250_101  # of every simulation here: the same numbers in every process
_SHAPES = np.concatenate([np.linspace(-3.0, -1.25, 8), np.linspace(-1.0, 0.9, 20)])  # where the PWM bias is simulated


def num_simulations(width: int) -> int:
    """Number of samples of `width` that a simulation draws: 10,000, fewer where it would take seconds.

    >>> num_simulations(128), num_simulations(4096)
    (10000, 2000)
    """
    return int(np.clip(5_000_000 // width, 2_000, 10_000))


@lru_cache(maxsize=64)
def expected_normal_order_statistics(m: int, k: int) -> Tensor:
    """Expected order statistics `E[Z_(j)]` of the `k` largest of `m` standard normals, largest first, [k] float64.

    Accurate to about 1e-10:

        integral of x * m!/((j-1)! (m-j)!) * Phi(-x)^(j-1) * Phi(x)^(m-j) * phi(x) over x,     j = 1..k from the top

    by the trapezoidal rule, which converges exponentially for such integrands: the step is a fifth of the narrowest
    peak's width. Blom's `Phi^-1((m - j + 0.625)/(m + 0.25))` would be off by up to 0.02 at the extremes.

    >>> expected_normal_order_statistics(3, 2)
    tensor([ 8.4628e-01, -4.9707e-17], dtype=torch.float64)
    """
    upper = math.sqrt(2 * (math.log(m) + 40))
    x = np.linspace(-upper, upper, int(8 * upper * math.sqrt(m)) + 200)
    rank = np.arange(1, k + 1)[:, None]
    log_density = (rank - 1) * log_ndtr(-x) + (m - rank) * log_ndtr(x) - x**2 / 2 - math.log(2 * math.pi) / 2
    log_density += gammaln(m + 1) - gammaln(rank) - gammaln(m - rank + 1)
    return torch.from_numpy((np.exp(log_density) * x).sum(axis=1) * (x[1] - x[0]))


def qq_r2(tail: Tensor, m: int) -> Tensor:
    """Squared correlation of each sample's upper tail with the expected order statistics of `m` standard normals.

    Args:
        tail: [Q, k] float64, the k >= 3 largest of m values, largest first.
        m: Sample size.

    Returns:
        [Q] float64, 1 = on a line; NaN for a tail without spread.

    >>> qq_r2(torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.float64), m=8)
    tensor([0.9535], dtype=torch.float64)
    """
    expected = centred(expected_normal_order_statistics(m, tail.shape[1])).to(tail.device)
    values = centred(tail)
    values = ratio_or_zero(values, values.abs().amax(dim=1, keepdim=True))  # squares neither over- nor underflow
    squares = values.square().sum(dim=1)
    return (values @ expected).square() / (squares * expected.square().sum()).masked_fill(squares == 0, float("nan"))


def pwm_shape(tail: Tensor) -> Tensor:
    """Shape `xi` of a generalised Pareto distribution from the excesses over the smallest value of each tail, by
    probability-weighted moments (Hosking and Wallis 1987).

        l1 = mean of e,   l2 = half the mean difference of two e,   xi = 2 - l1/l2

    0 is an exponential tail, positive a power law, negative a bounded one (uniform: -1). With 20 to 200 excesses these
    have a smaller error than maximum likelihood, always exist (xi < 1), and hold for any xi below 1/2; above,
    the estimate is too low but keeps its order. Biased by O(1/k): see `_pareto_shape_map`.

    Args:
        tail: [Q, k] float64, largest first, k >= 3; the last one is the threshold and no excess.

    Returns:
        [Q] float64; NaN where all excesses are equal.

    >>> pwm_shape(torch.tensor([[4.0, 2.0, 1.0, 0.0]], dtype=torch.float64))
    tensor([-0.3333], dtype=torch.float64)
    """
    excess = tail[:, :-1] - tail[:, -1:]
    size = excess.shape[1]
    rank_from_below = torch.arange(size - 1, -1, -1, dtype=tail.dtype, device=tail.device)
    first = excess.mean(dim=1)
    second = 2 * (excess * rank_from_below).mean(dim=1) / (size - 1) - first
    degenerate = excess[:, 0] == excess[:, -1]
    return 2 - first / second.masked_fill(degenerate, float("nan"))


class TailNull(NamedTuple):
    """What the top `k` of `m` standard normals have, from a seeded simulation."""

    r2: Tensor  # [S] float64, `qq_r2`, ascending
    shape: Tensor  # scalar float64, mean of `pwm_shape`
    two_clusters: Tensor  # scalar float64, mean of `two_cluster_share`
    profile_mean: Tensor  # [k] float64, mean of `standardised_tail`
    profile_std: Tensor  # [k] float64, its standard deviation


@lru_cache(maxsize=16)
def gaussian_tail_null(m: int, k: int) -> TailNull:
    """Simulate the tails of Gaussian samples, once a process for each `(m, k)`: a tenth of a second for m = 128.

    10,000 samples, so that the 5% level is within 0.2%.

    >>> round(gaussian_tail_null(64, 32).r2.median().item(), 3)
    0.974
    """
    draws = np.random.default_rng(_SEED).standard_normal((num_simulations(m), m))
    tail = torch.from_numpy(draws).topk(k, dim=1).values
    profile = standardised_tail(tail, m)
    return TailNull(
        r2=qq_r2(tail, m).sort().values,
        shape=pwm_shape(tail).mean(),
        two_clusters=two_cluster_share(tail).mean(),
        profile_mean=profile.mean(dim=0),
        profile_std=profile.std(dim=0),
    )


def standardised_tail(tail: Tensor, m: int) -> Tensor:
    """Standardise each tail to the mean and spread that `m` standard normals expect there, [Q, k]; NaN without spread.

    >>> standardised_tail(torch.tensor([[4.0, 2.0, 0.0]], dtype=torch.float64), m=8)
    tensor([[1.3948, 0.9162, 0.4376]], dtype=torch.float64)
    """
    expected = expected_normal_order_statistics(m, tail.shape[1]).to(tail.device)
    spread = tail.std(dim=1, keepdim=True)
    unit = centred(tail) / spread.masked_fill(tail[:, :1] == tail[:, -1:], float("nan"))
    return expected.mean() + expected.std() * unit


@lru_cache(maxsize=16)
def _pareto_shape_map(k: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of `pwm_shape` over generalised Pareto tails of size `k` (ascending), and their true shapes.

    Excesses over the k-th largest value of such a sample are k - 1 independent draws of the same shape; sorted uniforms
    are drawn once and turned into each shape's quantiles `(u^-xi - 1)/xi`.
    """
    rng = np.random.default_rng(_SEED)
    log_uniforms = np.log(np.sort(1 - rng.random((num_simulations(4 * k), k - 1)), axis=1))
    means = []
    for shape in _SHAPES:
        excess = np.expm1(-shape * log_uniforms) / shape if abs(shape) > 1e-12 else -log_uniforms
        tail = torch.from_numpy(np.concatenate([excess, np.zeros((len(excess), 1))], axis=1))
        means.append(float(pwm_shape(tail).mean()))
    return np.array(means), _SHAPES


def _without_bias(shape: Tensor, k: int) -> Tensor:
    """The Pareto shape whose `pwm_shape` over tails of size `k` is `shape` on average; kept within [-3, 0.9]."""
    means, shapes = _pareto_shape_map(k)
    corrected = torch.as_tensor(np.interp(shape.cpu().numpy(), means, shapes), dtype=torch.float64)
    return corrected.masked_fill(shape.isnan().cpu(), float("nan"))


class ShapeFit(NamedTuple):
    """A tail shape pooled over prompts; scalars, float64."""

    shape: Tensor
    standard_error: Tensor  # with the prompt as the unit
    gaussian: Tensor  # what Gaussian samples of the same size have by the same estimator
    num_prompts: Tensor  # int64


def pooled_shape(shapes: Tensor, m: int, k: int) -> ShapeFit:
    """Pool the prompts' `pwm_shape`: their mean without its bias, and its error carried through the correction.

    Averaging first and correcting then is right where correcting each noisy value would not be.

    Args:
        shapes: [Q] float64; NaN prompts are left out.
        m: Samples of each prompt.
        k: Size of each tail.

    >>> round(pooled_shape(torch.tensor([-0.4, -0.3], dtype=torch.float64), 64, 32).shape.item(), 2)
    -0.33
    """
    mean, error, num_prompts = mean_over_prompts(shapes.cpu())
    step = 0.05
    slope = (_without_bias(mean + step, k) - _without_bias(mean - step, k)) / (2 * step)
    gaussian = _without_bias(gaussian_tail_null(m, k).shape, k)
    return ShapeFit(_without_bias(mean, k), error * slope, gaussian, num_prompts)
