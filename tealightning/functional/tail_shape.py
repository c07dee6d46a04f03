"""How a sample's upper tail compares with a Gaussian's: clusters, QQ line, Pareto shape, held-out predictions.

Each comes with the values that Gaussian samples of the same size have, by seeded simulation where there is no formula.
`tail` is [Q, k] float64, the k largest of each prompt's M samples, largest first; results over prompts are [Q] float64.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln, log_ndtr
from torch import Tensor

from tealightning.functional import tail as tails
from tealightning.functional.best_of_n import best_of_n_weights
from tealightning.functional.moments import below_and_tied, centred, ratio_or_zero, sample_std
from tealightning.functional.statistics import mean_over_prompts

SMALLEST_CLUSTER = 3
"""Fewer samples are outliers, not a cluster."""
_SHAPE_SEED, _PREDICTION_SEED = 20_250_101, 20_250_102  # the same numbers in every process
_SHAPES = np.concatenate([np.linspace(-3.0, -1.25, 8), np.linspace(-1.0, 0.9, 20)])  # where the PWM bias is simulated


def largest_atom(values: Tensor) -> Tensor:
    """Share of each row that has the row's most frequent value; 0 where all values differ.

    >>> largest_atom(torch.tensor([[1.0, 1.0, 2.0, 3.0]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """
    _, copies = below_and_tied(values)
    return copies.masked_fill(copies == 1, 0).double().amax(dim=1) / values.shape[1]


def two_cluster_share(values: Tensor) -> Tensor:
    """Share of each row's variance that lies between two clusters, at the cut between neighbours that makes it largest.

        max over n of  n (k - n)/k * (mean of the n lowest - mean of the others)^2 / sum of squares,   3 <= n <= k - 3

    1 for two points; 0.64 for a Gaussian, 0.75 for a uniform distribution; NaN without spread, and for k < 6.

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


@lru_cache(maxsize=64)
def expected_normal_order_statistics(m: int, k: int) -> Tensor:
    """Expected order statistics `E[Z_(j)]` of the `k` largest of `m` standard normals, largest first, [k] float64.

        integral of x * m!/((j-1)! (m-j)!) * Phi(-x)^(j-1) * Phi(x)^(m-j) * phi(x) over x,     j = 1..k from the top

    by the trapezoidal rule, which converges exponentially for such integrands, to about 1e-10. Blom's approximation
    would be off by up to 0.02 at the extremes.

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
    """Squared correlation of each tail, k >= 3, with the expected order statistics of `m` standard normals.

    1 = on a line; NaN for a tail without spread.

    >>> qq_r2(torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.float64), m=8)
    tensor([0.9535], dtype=torch.float64)
    """
    expected = centred(expected_normal_order_statistics(m, tail.shape[1])).to(tail.device)
    values = centred(tail)
    values = ratio_or_zero(values, values.abs().amax(dim=1, keepdim=True))  # squares neither over- nor underflow
    squares = values.square().sum(dim=1)
    return (values @ expected).square() / (squares * expected.square().sum()).masked_fill(squares == 0, float("nan"))


def pwm_shape(tail: Tensor) -> Tensor:
    """Shape `xi` of a generalised Pareto distribution by probability-weighted moments (Hosking and Wallis 1987), from
    the excesses over the smallest value of each tail, k >= 3.

        l1 = mean of e,   l2 = half the mean difference of two e,   xi = 2 - l1/l2

    0 is an exponential tail, positive a power law, negative a bounded one (uniform: -1). With 20 to 200 excesses these
    have a smaller error than maximum likelihood, always exist (xi < 1), and hold for any xi below 1/2; above,
    the estimate is too low but keeps its order. Biased by O(1/k): see `pooled_shape`. NaN where all excesses are equal.

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
    """What the top `k` of `m` standard normals have, float64."""

    r2: Tensor  # [S], `qq_r2`, ascending
    shape: Tensor  # scalar, mean of `pwm_shape`
    two_clusters: Tensor  # scalar, mean of `two_cluster_share`
    profile_mean: Tensor  # [k], mean of `standardised_tail`
    profile_std: Tensor  # [k], its standard deviation


def _normal_samples(width: int, seed: int) -> Tensor:
    """10,000 samples of `width` standard normals, so that a 5% level is within 0.2%; fewer where it takes seconds."""
    count = int(np.clip(5_000_000 // width, 2_000, 10_000))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)))


@lru_cache(maxsize=16)
def gaussian_tail_null(m: int, k: int) -> TailNull:
    """Simulate the tails of Gaussian samples, once a process for each `(m, k)`, in a tenth of a second for m = 128.

    >>> round(gaussian_tail_null(64, 32).r2.median().item(), 3)
    0.974
    """
    tail = _normal_samples(m, _SHAPE_SEED).topk(k, dim=1).values
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
def _mean_pwm_shapes(k: int) -> np.ndarray:
    """The mean of `pwm_shape` over generalised Pareto tails of size `k`, ascending, one for each of `_SHAPES`.

    The excesses of such a tail are k - 1 independent draws of the same shape, quantiles `(u^-xi - 1)/xi` of uniforms.
    """
    count = int(np.clip(5_000_000 // (4 * k), 2_000, 10_000))
    uniforms = np.random.default_rng(_SHAPE_SEED).random((count, k - 1))
    log_uniforms = np.log(np.sort(1 - uniforms, axis=1))
    means = []
    for shape in _SHAPES:
        excess = np.expm1(-shape * log_uniforms) / shape if abs(shape) > 1e-12 else -log_uniforms
        tail = torch.from_numpy(np.concatenate([excess, np.zeros((count, 1))], axis=1))
        means.append(float(pwm_shape(tail).mean()))
    return np.array(means)


def _without_bias(shape: Tensor, k: int) -> Tensor:
    """The Pareto shape whose `pwm_shape` over tails of size `k` is `shape` on average; kept within [-3, 0.9]."""
    corrected = torch.as_tensor(np.interp(shape.cpu().numpy(), _mean_pwm_shapes(k), _SHAPES), dtype=torch.float64)
    return corrected.masked_fill(shape.isnan().cpu(), float("nan"))


class ShapeFit(NamedTuple):
    """A tail shape pooled over prompts; scalars, float64."""

    shape: Tensor
    standard_error: Tensor  # with the prompt as the unit
    gaussian: Tensor  # what Gaussian samples of the same size have by the same estimator
    num_prompts: Tensor  # int64


def pooled_shape(shapes: Tensor, m: int, k: int) -> ShapeFit:
    """Pool `pwm_shape` of the top k of m samples over prompts, without its bias, the error carried through; NaN is out.

    Averaging first and correcting then is right where correcting each noisy value would not be.

    >>> round(pooled_shape(torch.tensor([-0.4, -0.3], dtype=torch.float64), 64, 32).shape.item(), 2)
    -0.33
    """
    mean, error, num_prompts = mean_over_prompts(shapes.cpu())
    step = 0.05
    slope = (_without_bias(mean + step, k) - _without_bias(mean - step, k)) / (2 * step)
    gaussian = _without_bias(gaussian_tail_null(m, k).shape, k)
    return ShapeFit(_without_bias(mean, k), error * slope, gaussian, num_prompts)


def prediction_budgets(m: int, num_samples: int) -> tuple[int, ...]:
    """Budgets that the held-out samples can measure: the powers of two from 4 to `num_samples - m`, and that number.

    >>> prediction_budgets(16, 128)
    (4, 8, 16, 32, 64, 112)
    """
    largest = num_samples - m
    powers = (2**power for power in range(2, 31))
    return (*(n for n in powers if n < largest), largest)


def _predict_held_out(
    samples: Tensor, m: int, ns: tuple[int, ...], alpha: float, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hold the first `num_groups` disjoint groups of `m` of the samples [Q, M] against the M - m others.

    Returns `mu_a + ct_n sigma_a` of each group and best-of-n of the others, both [Q, groups, len(ns)], and sigma_a.
    """
    others_count = samples.shape[1] - m
    counts = torch.tensor([others_count], device=samples.device)
    weights = torch.cat([best_of_n_weights(counts, others_count, n) for n in ns])  # one set serves all rows
    predicted, measured, spread = [], [], []
    for start in range(0, num_groups * m, m):
        group = samples[:, start : start + m]
        others = torch.cat([samples[:, :start], samples[:, start + m :]], dim=1).sort(dim=1, descending=True).values
        predicted.append(tails.extrapolated_best_of_n(group, ns, alpha=alpha))
        measured.append(others[:, :1] + (others - others[:, :1]) @ weights.T)
        spread.append(tails.tail_statistics(group, alpha).std)
    return torch.stack(predicted, dim=1), torch.stack(measured, dim=1), torch.stack(spread, dim=1)


@lru_cache(maxsize=16)
def _gaussian_prediction_null(num_samples: int, m: int, ns: tuple[int, ...], alpha: float, level: float) -> Tensor:
    """Quantiles of `(predicted - measured) / sigma_a` between which `level` of Gaussian samples lie: [2, len(ns)].

    They do not depend on location and scale. An interval made of them covers Gaussian rewards exactly, up to 0.3%.
    """
    samples = _normal_samples(num_samples, _PREDICTION_SEED)
    predicted, measured, spread = _predict_held_out(samples, m, ns, alpha, num_groups=1)
    pivot = (predicted - measured).squeeze(1) / spread.squeeze(1)
    return pivot.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), dim=0)


@lru_cache(maxsize=16)
def gaussian_prediction_error(num_samples: int, m: int, ns: tuple[int, ...], alpha: float) -> Tensor:
    """Prediction error `E[(predicted - measured)/s]` of Gaussian rewards, [len(ns)]: the plug-in's bias of order 1/m.

        (E[mu_a] + ct_n E[sigma_a] - c_n) / E[s],     s = sample standard deviation of all `num_samples`

    The ratio of expectations is the expectation of the ratio, since for a Gaussian `s` is independent of what does not
    depend on location and scale (Basu). `E[sigma_a]` is simulated to about 0.001.

    >>> gaussian_prediction_error(64, 16, (4, 48), 0.25).round(decimals=2)
    tensor([-0.0200, -0.2600], dtype=torch.float64)
    """
    mean = float(expected_normal_order_statistics(m, tails.tail_size(alpha, m)).mean())
    count = max(2_000, min(5_000_000 // m, 100_000))
    draws = np.random.default_rng(_PREDICTION_SEED).standard_normal((count, m))
    spread = float(tails.tail_statistics(torch.from_numpy(draws), alpha).std.mean())
    errors = [mean + tails.tail_constants(n, alpha).ct_n * spread - tails.expected_max_normal(n) for n in ns]
    degrees = num_samples - 1
    expected_std = math.sqrt(2 / degrees) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return torch.tensor(errors, dtype=torch.float64) / expected_std


class HeldOut(NamedTuple):
    """Predicted against measured best-of-n; prompt by prompt in units of the standard deviation of its samples, NaN for
    a prompt without spread."""

    ns: tuple[int, ...]
    predicted: Tensor  # [Q, len(ns)], above the prompt's mean, mean over groups
    measured: Tensor  # [Q, len(ns)], the same
    error: Tensor  # [Q, len(ns)], predicted - measured
    covered: Tensor  # [Q, len(ns)], share of the groups whose interval holds what was measured
    gaussian_error: Tensor  # [len(ns)], the mean error of Gaussian samples of the same size: the plug-in's bias


def held_out_best_of_n(samples: Tensor, m: int, *, alpha: float, ns: tuple[int, ...], level: float = 0.9) -> HeldOut:
    """Compare predicted and measured best-of-n: fit each of the `M // m` groups, measure on the other M - m samples.

    A group's interval for the measured value is `[predicted - high * sigma_a, predicted - low * sigma_a]` with the
    quantiles of Gaussian samples, of which it covers `level`; a single point for a tail without spread. `samples`
    [Q, M >= 2m] are in an order that carries no information; a tail needs 2, and budgets are at most M - m.

    >>> samples = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> held_out_best_of_n(samples, 16, alpha=0.25, ns=(4, 48)).error.mean(dim=0)
    tensor([-0.0293, -0.2890], dtype=torch.float64)
    """
    size = samples.shape[1]
    low, high = _gaussian_prediction_null(size, m, ns, alpha, level)
    predicted, measured, spread = _predict_held_out(samples, m, ns, alpha, size // m)
    slack = 1e-12 * samples.abs().amax()  # a point interval holds its own value in spite of rounding
    above, below = measured >= predicted - high * spread - slack, measured <= predicted - low * spread + slack
    std = sample_std(samples)
    is_constant = std == 0

    def relative(values: Tensor, origin: Tensor | float = 0.0) -> Tensor:
        return ratio_or_zero(values.mean(dim=1) - origin, std).masked_fill(is_constant, float("nan"))

    mean = samples.mean(dim=1, keepdim=True)
    return HeldOut(
        ns=ns,
        predicted=relative(predicted, mean),
        measured=relative(measured, mean),
        error=relative(predicted - measured),
        covered=(above & below).double().mean(dim=1).masked_fill(is_constant, float("nan")),
        gaussian_error=gaussian_prediction_error(size, m, ns, alpha),
    )
