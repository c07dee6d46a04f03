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
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Generator, Tensor

from tealightning.diagnostics.worlds import World

BATCHES = (1, 32, 256)
"""Prompts a step for which figures are given."""
MIN_GROUPS = 2 * max(BATCHES)
_BLOCKS = 50  # of the jackknife
_CHUNK = 1 << 18  # rollouts in memory at once

Advantages = Callable[[Tensor], Tensor]


@dataclass(kw_only=True, slots=True)
class GroupGradients:
    """What one estimator made of G groups."""

    gradients: Tensor  # [G, d] float64, (1/m) sum_i A_i S_i
    energy: Tensor  # [G] float64, mean over the group of A^2
    zeros: Tensor  # [G] float64, share of the group whose advantage is exactly 0


@dataclass(kw_only=True, slots=True)
class Fidelity:
    """Figures by name, and their standard errors (NaN where a figure means nothing)."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """`{"bias": ..., "bias_se": ...}`, for a CSV row."""
        pairs = ((name, f"{name}_se") for name in self.values)
        return {
            key: number for name, se in pairs for key, number in ((name, self.values[name]), (se, self.errors[name]))
        }


def sample_chunks(world: World, m: int, *, groups: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rewards and scores of `groups` groups, in pieces that fit in memory.

    The random numbers follow from seed, world and m only: all estimators meet the same groups, whatever else is run.
    """
    generator = Generator().manual_seed(crc32(f"{seed}/{world.name}/{m}".encode()))
    size = max(1, _CHUNK // m)
    for start in range(0, groups, size):
        yield world.sample(min(size, groups - start), m, generator)


def group_gradients(
    estimators: Mapping[str, Advantages], world: World, m: int, *, groups: int, seed: int
) -> dict[str, GroupGradients]:
    """The gradients that every estimator makes of the same groups.

    Args:
        estimators: Rewards [P, m] to advantages [P, m], by label.
        world: Where the groups come from.
        m: Rollouts a group.
        groups: G.
        seed: What the groups follow from.
    """
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {label: [] for label in estimators}
    for rewards, scores in sample_chunks(world, m, groups=groups, seed=seed):
        for label, estimator in estimators.items():
            parts[label].append(_of_chunk(estimator(rewards), scores))
    result = {}
    for label, chunks in parts.items():
        gradients, energy, zeros = (torch.cat(column) for column in zip(*chunks, strict=True))
        result[label] = GroupGradients(gradients=gradients, energy=energy, zeros=zeros)
    return result


def _of_chunk(advantages: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.einsum("pm,pmd->pd", advantages, scores) / advantages.shape[1]
    return gradients, advantages.square().mean(1), (advantages == 0).double().mean(1)


def fidelity(found: GroupGradients, truth: Tensor, directions: Sequence[str]) -> Fidelity:
    """All figures of one estimator in one world.

    Args:
        found: Its gradients of G >= 512 groups.
        truth: [d] float64, the exact gradient.
        directions: Names of the d directions.
    """
    groups = len(found.gradients)
    result = Fidelity()
    for part in (
        _jackknifed(found, truth, directions),
        _norms(found.gradients, truth),
        *(_steps(found.gradients, truth, batch) for batch in BATCHES),
    ):
        result.values |= part.values
        result.errors |= part.errors
    result.values |= {"true_norm": float(truth.norm()), "groups": float(groups)}
    result.errors |= {"true_norm": 0.0, "groups": 0.0}
    return result


# ---------------------------------------------------------------- figures of the moments


def _jackknifed(found: GroupGradients, truth: Tensor, directions: Sequence[str]) -> Fidelity:
    """Smooth functions of the moments; their errors by leaving out one of 50 blocks of groups at a time."""
    columns = torch.cat([found.gradients, found.gradients.square(), found.energy[:, None], found.zeros[:, None]], dim=1)
    blocks = columns.tensor_split(_BLOCKS)
    sums = torch.stack([block.sum(0) for block in blocks])
    counts = torch.tensor([len(block) for block in blocks], dtype=torch.float64)[:, None]
    total, groups = sums.sum(0), len(columns)
    figures = _of_moments(total[None] / groups, truth, directions, groups)
    left_out = _of_moments((total - sums) / (groups - counts), truth, directions, groups)
    result = Fidelity()
    for name, value in figures.items():
        deviations = left_out[name] - left_out[name].mean()
        result.values[name] = float(value)
        result.errors[name] = float((deviations.square().sum() * (_BLOCKS - 1) / _BLOCKS).sqrt())
    return result


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


def _norms(gradients: Tensor, truth: Tensor) -> Fidelity:
    """Norms of the bias, as it is, over |truth|, and after the best scaling; the noise's own share is taken out."""
    covariance = torch.atleast_2d(gradients.T.cov()) / len(gradients)
    mean, norm = gradients.mean(0), float(truth.norm())
    bias, bias_error = norm_of_mean(mean - truth, covariance)
    sine, sine_error = _sine(mean, covariance, truth / norm)
    values = {"bias": bias, "normalised_bias": bias / norm, "scaled_bias": sine}
    errors = {"bias": bias_error, "normalised_bias": bias_error / norm, "scaled_bias": sine_error}
    return Fidelity(values=values, errors=errors)


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

    `|mean|^2` is too large by the trace of the covariance; that is subtracted (and a negative rest is 0). The error is
    that of the square, carried through the root; where the norm is lost in the noise it is of the noise's size.
    """
    trace = float(covariance.trace())
    square = float(mean @ mean) - trace
    square_error = math.sqrt(max(0.0, float(4 * mean @ covariance @ mean + 2 * covariance.square().sum())))
    if square_error == 0:
        return math.sqrt(max(0.0, square)), 0.0
    return math.sqrt(max(0.0, square)), square_error / (2 * math.sqrt(max(square, trace)))


# ---------------------------------------------------------------- single steps


def _steps(gradients: Tensor, truth: Tensor, batch: int) -> Fidelity:
    """What a single step over `batch` prompts points to: its cosine with the truth, and the share of its signs that
    are right (an exact 0 has neither direction nor sign: both count as 0)."""
    steps = len(gradients) // batch
    step = gradients[: steps * batch].view(steps, batch, -1).mean(1)
    norms = step.norm(dim=1)
    cosine = (step @ (truth / truth.norm())) / norms.masked_fill(norms == 0, 1.0)
    right = (step * truth > 0).double().mean(1)
    names = (f"step_cosine@{batch}", f"sign_agreement@{batch}")
    result = Fidelity()
    for name, values in zip(names, (cosine, right), strict=True):
        result.values[name] = float(values.mean())
        result.errors[name] = float(values.std()) / math.sqrt(steps)
    return result
