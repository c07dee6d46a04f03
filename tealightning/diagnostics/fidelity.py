"""Gradient fidelity: bias, noise, cosine and error against the exact gradient, each with a standard error.

With `g = (1/m) sum_i A_i S_i` [d] the gradient that one group gives, `t` the exact gradient, `mean` and `C` the mean
and covariance of g, a step over P prompts has the error

    rmse_P^2 = |mean - t|^2 + trace(C)/P

An estimator that standardises (divides by the group's spread) has no scale of its own: an optimizer's step size sets
it. What compares all estimators is what is left after the best positive factor,

    scaled_bias   = min over c > 0 of |c mean - t| / |t|                         = sin of the angle between mean and t
    scaled_rmse_P = min over c > 0 of sqrt(|c mean - t|^2 + c^2 trace(C)/P)/|t|

and noise over signal, with signal the projection of the mean on t. `rms_advantage` is the noise put into each direction
of parameter space that has nothing to do with the reward (a score of variance 1 there gets `rms_advantage/sqrt(m P)`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from scipy.special import ndtri
from torch import Generator, Tensor

from tealightning.diagnostics.worlds import World

BATCHES = (1, 32, 256)  # prompts a step for which figures are given
_BLOCKS = 50  # of the jackknife
_CHUNK = 1 << 18  # rollouts in memory at once

Advantages = Callable[[Tensor], Tensor]  # an estimator: rewards [P, m] to advantages [P, m]
Figures = dict[str, float]
"""Figures of an estimator, the same schema in analytic worlds and on a policy. Beside each `NAME` stand its standard
error `NAME_se`, or the ends of its 95% interval `NAME_low` and `NAME_high`; NaN where a figure means nothing."""
Row = dict[str, Any]
"""A result: `estimator`, its setting (`m`, ...), `units` ("reward" if the gradient has a scale that can be right or
wrong, "own" if it has not, empty for a refusal), `note` (a warning or the refusal) and, unless refused, `Figures`."""


class GroupGradients(NamedTuple):
    """Gradients of G groups by one estimator."""

    gradients: Tensor  # [G, d] float64, (1/m) sum_i A_i S_i
    energy: Tensor  # [G] float64, mean over the group of A^2
    zeros: Tensor  # [G] float64, share of the group whose advantage is exactly 0


def sample_chunks(world: World, m: int, *, groups: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rewards and scores of `groups` groups, in pieces that fit in memory; random numbers follow from seed, world and m
    only: all estimators meet the same groups, whatever else is run."""
    generator = Generator().manual_seed(crc32(f"{seed}/{world.name}/{m}".encode()))
    size = max(1, _CHUNK // m)
    for start in range(0, groups, size):
        yield world.sample(min(size, groups - start), m, generator)


def group_gradients(
    estimators: Mapping[str, Advantages], world: World, m: int, *, groups: int, seed: int
) -> dict[str, GroupGradients]:
    """Gradients that every estimator makes of the same groups, by its label."""
    chunks: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {label: [] for label in estimators}
    for rewards, scores in sample_chunks(world, m, groups=groups, seed=seed):
        for label, estimator in estimators.items():
            advantages = estimator(rewards)
            gradients = torch.einsum("pm,pmd->pd", advantages, scores) / m
            zeros = (advantages == 0).double().mean(1)
            chunks[label].append((gradients, advantages.square().mean(1), zeros))
    return {label: GroupGradients(*map(torch.cat, zip(*parts, strict=True))) for label, parts in chunks.items()}


def fidelity(groups: GroupGradients, truth: Tensor, directions: Sequence[str]) -> Figures:
    """Figures of one estimator from G >= 512 groups, against the exact gradient [d] float64 along named directions."""
    figures = _jackknifed(groups, truth, directions) | _norms(groups.gradients, truth) | _steps(groups.gradients, truth)
    exact = {"true_norm": float(truth.norm()), "true_norm_se": 0.0}
    return figures | exact | {"groups": float(len(groups.gradients)), "groups_se": 0.0}


def _jackknifed(groups: GroupGradients, truth: Tensor, directions: Sequence[str]) -> Figures:
    """Smooth functions of the moments; their errors by leaving out one of 50 blocks of groups at a time."""
    gradients = groups.gradients
    columns = torch.cat([gradients, gradients.square(), groups.energy[:, None], groups.zeros[:, None]], dim=1)
    blocks = columns.tensor_split(_BLOCKS)
    sums = torch.stack([block.sum(0) for block in blocks])
    counts = torch.tensor([len(block) for block in blocks], dtype=torch.float64)[:, None]
    total, size = sums.sum(0), len(columns)
    left_out = _of_moments((total - sums) / (size - counts), truth, directions, size)
    figures: Figures = {}
    for name, value in _of_moments(total[None] / size, truth, directions, size).items():
        deviations = left_out[name] - left_out[name].mean()
        figures[name] = float(value)
        figures[f"{name}_se"] = float((deviations.square().sum() * (_BLOCKS - 1) / _BLOCKS).sqrt())
    return figures


def _of_moments(moments: Tensor, truth: Tensor, directions: Sequence[str], groups: int) -> dict[str, Tensor]:
    """Figures [J] of moments [J, 2 d + 2]: means of the gradient, its square, the energy and the zeros."""
    d = len(truth)
    mean, energy, zeros = moments[:, :d], moments[:, 2 * d], moments[:, 2 * d + 1]
    variance = (moments[:, d : 2 * d] - mean.square()).clamp(min=0)
    trace, norm = variance.sum(1), truth.norm()
    signal = mean @ (truth / norm)
    figures = {"signal": signal, "cosine": signal / mean.norm(dim=1), "sd": trace.sqrt(), "zeros": zeros}
    for i, direction in enumerate(directions):
        figures[f"bias[{direction}]"] = mean[:, i] - truth[i]
        figures[f"sd[{direction}]"] = variance[:, i].sqrt()
    positive = signal.where(signal > 0, torch.nan)  # against the gradient, a ratio to the signal means nothing
    figures["noise_over_signal"] = trace.sqrt() / positive
    figures["rms_advantage"] = energy.sqrt()
    figures["rms_advantage_over_signal"] = energy.sqrt() / positive
    for batch in BATCHES:
        noise = trace * (1 / batch - 1 / groups)  # the mean itself carries trace/groups already
        figures[f"rmse@{batch}"] = ((mean - truth).square().sum(1) + noise).sqrt()
        explained = signal.clamp(min=0).square() / (mean.square().sum(1) + noise)
        figures[f"scaled_rmse@{batch}"] = (1 - explained.nan_to_num(0.0)).clamp(min=0).sqrt()
    return figures


def _norms(gradients: Tensor, truth: Tensor) -> Figures:
    """Norms of the bias, as it is, over |truth|, and after the best scaling; the noise's own share is taken out."""
    covariance = torch.atleast_2d(gradients.T.cov()) / len(gradients)
    mean, norm = gradients.mean(0), float(truth.norm())
    bias, error = norm_of_mean(mean - truth, covariance)
    figures = {"bias": bias, "bias_se": error, "normalised_bias": bias / norm, "normalised_bias_se": error / norm}
    return figures | dict(zip(("scaled_bias", "scaled_bias_se"), _sine(mean, covariance, truth / norm), strict=True))


def _sine(mean: Tensor, covariance: Tensor, along: Tensor) -> tuple[float, float]:
    """Of the angle between the expected gradient and the truth, 1 beyond a right angle, and its standard error."""
    length, signal = float(mean.norm()), float(mean @ along)
    if length == 0:
        return math.nan, math.nan
    undecided = abs(signal) < 2 * math.sqrt(float(along @ covariance @ along))  # it may point either way
    if signal <= 0:
        return 1.0, 1.0 if undecided else 0.0
    across = torch.eye(len(along), dtype=along.dtype) - torch.outer(along, along)
    part, error = norm_of_mean(across @ mean, across @ covariance @ across)
    return part / length, 1.0 if undecided else error / length


def norm_of_mean(mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """|E mean| and its standard error, from a noisy mean [d] with this covariance [d, d].

    `|mean|^2` is too large by the trace of the covariance: that is subtracted (a negative rest is 0). The error is of
    the square, carried through the root; where the norm is lost in the noise it is of the noise's size.
    """
    trace = float(covariance.trace())
    square = float(mean @ mean) - trace
    square_error = math.sqrt(max(0.0, float(4 * mean @ covariance @ mean + 2 * covariance.square().sum())))
    if square_error == 0:
        return math.sqrt(max(0.0, square)), 0.0
    return math.sqrt(max(0.0, square)), square_error / (2 * math.sqrt(max(square, trace)))


def _steps(gradients: Tensor, truth: Tensor) -> Figures:
    """Mean cosine of single steps with the truth, and the share of their signs that are right (an exact 0 has neither
    direction nor sign: both count as 0)."""
    figures: Figures = {}
    for batch in BATCHES:
        steps = len(gradients) // batch
        step = gradients[: steps * batch].view(steps, batch, -1).mean(1)
        norms = step.norm(dim=1)
        cosine = (step @ (truth / truth.norm())) / norms.masked_fill(norms == 0, 1.0)
        right = (step * truth > 0).double().mean(1)
        for name, values in ((f"step_cosine@{batch}", cosine), (f"sign_agreement@{batch}", right)):
            figures |= {name: float(values.mean()), f"{name}_se": float(values.std()) / math.sqrt(steps)}
    return figures


# ---------------------------------------------------------------- how fast a bias falls with the group size
#
# At m = 512 the bias is a hundredth of the noise. What an estimator computes is, to first order, a mean over the group
# of a function of the latent; group means of functions with known expectation explain most of its noise and,
# subtracted, leave the expectation as it is.


def truncated_moments(threshold: float, highest: int) -> list[float]:
    """`E[z^p 1{z > t}]` for p = 0..highest, z standard normal: `I_p = t^(p-1) phi(t) + (p-1) I_(p-2)`."""
    density = math.exp(-0.5 * threshold**2) / math.sqrt(2 * math.pi)
    moments = [0.5 * math.erfc(threshold / math.sqrt(2)), density]
    for p in range(2, highest + 1):
        moments.append(threshold ** (p - 1) * density + (p - 1) * moments[p - 2])
    return moments[: highest + 1]


def group_controls(z: Tensor, alpha: float) -> Tensor:
    """Group means [P, c] of functions of expectation 0 of standard normal latents [P, m]: powers of z, and of z above
    its upper-alpha quantile; all float64."""
    columns = []
    if alpha < 1:
        threshold = float(-ndtri(alpha))
        above = (z > threshold).double()
        for p, expected in enumerate(truncated_moments(threshold, 5)):
            columns.append((above * z**p).mean(1) - expected)
    for p in range(1, 5):
        expected = math.prod(range(1, p, 2)) if p % 2 == 0 else 0.0
        columns.append((z**p).mean(1) - expected)
    return torch.stack(columns, dim=1)


def controlled_mean(values: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] of `values` [G, d] with `controls` [G, c] of expectation 0 regressed out, and its covariance matrix."""
    design = torch.cat([torch.ones_like(controls[:, :1]), controls], dim=1)
    scale = design.square().mean(0).sqrt()
    gram_inverse = torch.linalg.inv((design / scale).T @ (design / scale))
    coefficients = gram_inverse @ ((design / scale).T @ values)
    residuals = values - (design / scale) @ coefficients
    variance = residuals.T @ residuals / (len(values) - design.shape[1])
    return coefficients[0] / scale[0], variance * gram_inverse[0, 0]


class SlopeFit(NamedTuple):
    """`log y = intercept + slope * log x`."""

    slope: float
    slope_error: float  # from the errors of the points
    misfit: float  # sqrt(chi^2 per degree of freedom), at least 1: how far the points lie off the line, in errors
    points: int  # that took part

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the slope, widened by the misfit: a curved relation has no sharp slope."""
        half = 1.96 * self.slope_error * self.misfit
        return self.slope - half, self.slope + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.slope:.2f} [{low:.2f}, {high:.2f}]"


def fit_log_slope(x: Tensor, y: Tensor, errors: Tensor) -> SlopeFit | None:
    """Weighted least squares of `log y` on `log x` with standard errors `errors / y`, without the points below two of
    them, whose logarithm is noise; None with fewer than 2 others."""
    usable = (y > 2 * errors) & (y > 0)
    if usable.sum() < 2:
        return None
    log_x, log_y = x[usable].log().numpy(), y[usable].log().numpy()
    weights = (y[usable] / errors[usable].clamp(min=1e-300)).numpy()
    (slope, intercept), covariance = np.polyfit(log_x, log_y, 1, w=weights, cov="unscaled")
    chi_square = np.sum((weights * (log_y - intercept - slope * log_x)) ** 2)
    misfit = max(1.0, math.sqrt(chi_square / max(1, len(log_x) - 2)))
    return SlopeFit(float(slope), math.sqrt(covariance[0, 0]), misfit, len(log_x))
