"""Predict best-of-n from a group of m samples, and compare it with the prompt's other samples."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tealightning.functional.best_of_n import best_of_n_weights
from tealightning.functional.moments import ratio_or_zero, sample_std
from tealightning.functional.tail import (
    expected_max_normal,
    extrapolated_best_of_n,
    tail_constants,
    tail_size,
    tail_statistics,
)
from tealightning.functional.tail_shape import expected_normal_order_statistics, num_simulations

_SEED = 20_250_102  # of every simulation here: the same numbers in every process


def prediction_budgets(m: int, num_samples: int) -> tuple[int, ...]:
    """Budgets that the held-out samples can measure: the powers of two from 4 to `num_samples - m`, and that number.

    >>> prediction_budgets(16, 128)
    (4, 8, 16, 32, 64, 112)
    """
    largest = num_samples - m
    powers = (2**power for power in range(2, 31))
    return (*(n for n in powers if n < largest), largest)


class Prediction(NamedTuple):
    """Predictions from groups that are held against the same prompt's other samples, each [..., len(ns)] float64."""

    predicted: Tensor  # mu_a + ct_n sigma_a of the group
    measured: Tensor  # unbiased best-of-n of the others
    spread: Tensor  # [..., 1], sigma_a of the group


def _predict_held_out(samples: Tensor, m: int, ns: tuple[int, ...], alpha: float, num_groups: int) -> Prediction:
    """The first `num_groups` disjoint groups of `m` samples, each held against the M - m others; [Q, groups, len(ns)].

    Args:
        samples: [Q, M] float64 in an order that carries no information, `M >= num_groups * m`.
        m: Samples that a prediction is made from.
        ns: Budgets, at most M - m.
        alpha: Upper-tail level of the surrogate.
        num_groups: How many groups.
    """
    parts = []
    for group in range(num_groups):
        fitted = samples[:, group * m : (group + 1) * m]
        others = torch.cat([samples[:, : group * m], samples[:, (group + 1) * m :]], dim=1)
        predicted = extrapolated_best_of_n(fitted, ns, alpha=alpha)
        parts.append((predicted, _measured(others, ns), tail_statistics(fitted, alpha).std))
    return Prediction(*(torch.stack(part, dim=1) for part in zip(*parts, strict=True)))


def _measured(samples: Tensor, ns: tuple[int, ...]) -> Tensor:
    """`functional.best_of_n.best_of_n` where all rows have all samples: one set of weights serves them all."""
    counts = torch.tensor([samples.shape[1]], device=samples.device)
    weights = torch.cat([best_of_n_weights(counts, samples.shape[1], n) for n in ns])
    descending = samples.sort(dim=1, descending=True).values
    return descending[:, :1] + (descending - descending[:, :1]) @ weights.T


class PredictionNull(NamedTuple):
    """Between which quantiles of `(predicted - measured) / sigma_a` a share `level` lies if rewards are Gaussian."""

    low: Tensor  # [len(ns)] float64
    high: Tensor  # [len(ns)] float64


@lru_cache(maxsize=16)
def _gaussian_prediction_null(
    num_samples: int, m: int, ns: tuple[int, ...], alpha: float, level: float
) -> PredictionNull:
    """Simulate the null, once a process.

    The quantiles do not depend on location and scale, so an interval made of them covers Gaussian rewards exactly
    (up to 0.3%, the simulation's error).
    """
    draws = np.random.default_rng(_SEED).standard_normal((num_simulations(num_samples), num_samples))
    samples = torch.from_numpy(draws)
    found = _predict_held_out(samples, m, ns, alpha, num_groups=1)
    difference = (found.predicted - found.measured).squeeze(1)
    pivot = difference / found.spread.squeeze(1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return PredictionNull(*pivot.quantile(tails, dim=0))


def gaussian_prediction_error(num_samples: int, m: int, ns: tuple[int, ...], alpha: float) -> Tensor:
    """Prediction error `E[(predicted - measured)/s]` of Gaussian rewards, [len(ns)]: the plug-in's bias of order 1/m.

        (E[mu_a] + ct_n E[sigma_a] - c_n) / E[s],     s = sample standard deviation of all `num_samples`

    The ratio of expectations is the expectation of the ratio, since for a Gaussian `s` is independent of what does not
    depend on location and scale (Basu).

    >>> gaussian_prediction_error(64, 16, (4, 48), 0.25).round(decimals=2)
    tensor([-0.0200, -0.2600], dtype=torch.float64)
    """
    k = tail_size(alpha, m)
    mean = float(expected_normal_order_statistics(m, k).mean())
    errors = [mean + tail_constants(n, alpha).ct_n * _expected_spread(m, alpha) - expected_max_normal(n) for n in ns]
    degrees = num_samples - 1
    expected_std = math.sqrt(2 / degrees) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return torch.tensor(errors, dtype=torch.float64) / expected_std


@lru_cache(maxsize=16)
def _expected_spread(m: int, alpha: float) -> float:
    """`E[sigma_a]` of `m` standard normals, simulated to about 0.001."""
    draws = np.random.default_rng(_SEED).standard_normal((max(2_000, min(5_000_000 // m, 100_000)), m))
    return float(tail_statistics(torch.from_numpy(draws), alpha).std.mean())


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
    quantiles of `_gaussian_prediction_null`: `level` of the groups are covered if rewards are Gaussian. A group whose
    tail has no spread has a single point for an interval.

    Args:
        samples: [Q, M] float64, M >= 2m, in an order that carries no information.
        m: Samples that a prediction is made from; its tail needs 2.
        alpha: Upper-tail level of the surrogate.
        ns: Budgets, at most M - m.
        level: Share that the interval is to cover.

    >>> samples = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> held_out_best_of_n(samples, 16, alpha=0.25, ns=(4, 48)).error.mean(dim=0)
    tensor([-0.0293, -0.2890], dtype=torch.float64)
    """
    null = _gaussian_prediction_null(samples.shape[1], m, ns, alpha, level)
    found = _predict_held_out(samples, m, ns, alpha, samples.shape[1] // m)
    slack = 1e-12 * samples.abs().amax()  # a point interval holds its own value in spite of rounding
    low, high = found.predicted - null.high * found.spread, found.predicted - null.low * found.spread
    covered = ((found.measured >= low - slack) & (found.measured <= high + slack)).double().mean(dim=1)
    std = sample_std(samples)
    is_constant = std == 0

    def relative(values: Tensor, origin: Tensor | float = 0.0) -> Tensor:
        return ratio_or_zero(values.mean(dim=1) - origin, std).masked_fill(is_constant, float("nan"))

    mean = samples.mean(dim=1, keepdim=True)
    return HeldOut(
        ns=ns,
        predicted=relative(found.predicted, mean),
        measured=relative(found.measured, mean),
        error=relative(found.predicted - found.measured),
        covered=covered.masked_fill(is_constant, float("nan")),
        gaussian_error=gaussian_prediction_error(samples.shape[1], m, ns, alpha),
    )
