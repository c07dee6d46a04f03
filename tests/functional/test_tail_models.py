"""Weights of each tail model against the exact gradient of best-of-N, by quadrature over the population.

`E[w(R) S(R)]`, with w the influence function of the model's best-of-N and S the score of a parameter of the reward's
distribution, is the derivative of E[max of N] in that parameter wherever the model's family holds.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, ndtr

from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.max_at_k import max_at_k_loo_weights
from tealightning.functional.tail import (
    HIGHEST_SHAPE,
    LOWEST_SHAPE,
    TAIL_MODELS,
    empirical_weights,
    expected_max_gpd,
    expected_max_normal,
    gaussian_influence,
    gpd_influence,
    gpd_weights,
    tail_constants,
    tail_weights,
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(2000)


def integral(values: np.ndarray, low: float, high: float) -> float:
    """Of a function given at `nodes(low, high)`."""
    return float((values * WEIGHTS).sum() * (high - low) / 2)


def nodes(low: float, high: float) -> np.ndarray:
    return low + (NODES + 1) / 2 * (high - low)


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize("target_n", [8, 128, 4096])
@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_gaussian_influence_is_the_gradient_for_gaussian_rewards(target_n, alpha):
    constants = tail_constants(target_n, alpha)
    u = nodes(constants.z, 12.0)
    excess = torch.from_numpy(u - constants.z)[None]
    mean_excess = column(constants.lambda_ - constants.z)
    w = gaussian_influence(excess, mean_excess, column(constants.kappa), target_n=target_n, alpha=alpha)[0].numpy()
    density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    assert integral(w * u * density, constants.z, 12.0) == pytest.approx(1.0, abs=1e-6)
    by_scale = integral(w * (u * u - 1) * density, constants.z, 12.0)
    assert by_scale == pytest.approx(expected_max_normal(target_n), abs=1e-6)


def gpd_expected_max(scale: float, shape: float, n: int) -> float:
    """E[max of n] of a generalised Pareto reward from 0: the integral of the quantile at e^-y."""
    y = nodes(0.0, 80.0)
    quantile = y if shape == 0 else np.expm1(shape * y) / shape
    log_survival = n * np.log1p(-np.exp(-y))
    density = n * np.exp(-y + log_survival - np.log1p(-np.exp(-y)))
    return scale * integral(quantile * density, 0.0, 80.0)


@pytest.mark.parametrize("shape", [-0.45, -0.3, 0.0, 0.1, 0.2])
@pytest.mark.parametrize("target_n", [64, 512])
def test_gpd_influence_is_the_gradient_for_generalised_pareto_rewards(shape, target_n):
    """Directions: location, scale and shape of rewards that are generalised Pareto as a whole, hence above any
    threshold.

    Only the scores above the threshold matter. What the model leaves out is that all N rewards lie below it. (Below
    shape -1/2 the end point of the tail moves so sharply that a location has no score.)
    """
    alpha, scale = 0.25, 1.7
    r = scale * (-math.log(alpha) if shape == 0 else (alpha**-shape - 1) / shape)
    y = nodes(-math.log(alpha), 80.0)  # R = quantile at survival probability e^-y
    u = scale * (y if shape == 0 else np.expm1(shape * y) / shape)
    probability = np.exp(-y)
    tail_scale = scale + shape * r
    mean_excess, std = tail_scale / (1 - shape), tail_scale / ((1 - shape) * math.sqrt(1 - 2 * shape))
    excess = torch.from_numpy(u - r)[None]
    w = gpd_influence(
        excess, torch.ones_like(excess), column(mean_excess), column(std), target_n=target_n, alpha=alpha
    )[0].numpy()

    growth = 1 + shape * u / scale
    by_location = (1 + shape) / (scale * growth)
    by_scale = (-1 + (1 + shape) * u / scale / growth) / scale
    by_shape = y * y / 2 - y if shape == 0 else y / shape - (1 + 1 / shape) * (u / scale) / growth
    ends = (-math.log(alpha), 80.0)
    step = 1e-4
    expected = (
        1.0,
        gpd_expected_max(1.0, shape, target_n),
        (gpd_expected_max(scale, shape + step, target_n) - gpd_expected_max(scale, shape - step, target_n))
        / (2 * step),
    )
    for score, derivative in zip((by_location, by_scale, by_shape), expected, strict=True):
        assert integral(w * score * probability, *ends) == pytest.approx(derivative, rel=1e-6, abs=1e-6)


def test_expected_max_gpd_is_exact_for_generalised_pareto_rewards():
    shape, scale, alpha, n = -0.3, 1.7, 0.25, 128
    r = scale * (alpha**-shape - 1) / shape
    best = r + (scale + shape * r) * expected_max_gpd(column(shape), target_n=n, alpha=alpha)[0].item()
    assert best == pytest.approx(gpd_expected_max(scale, shape, n), abs=1e-9)


@pytest.mark.parametrize("target_n", [1, 128, 4096])
@pytest.mark.parametrize("shape", [LOWEST_SHAPE, -0.41, 0.0, 0.13, HIGHEST_SHAPE])
def test_expected_max_gpd_and_its_slope_are_accurate_within_the_interval(target_n, shape):
    y = nodes(0.0, 90.0)
    kernel = -np.expm1(target_n * np.log1p(-0.25 * np.exp(-y))) * np.exp(shape * y)
    value, slope = expected_max_gpd(column(shape), target_n=target_n, alpha=0.25)
    assert value.item() == pytest.approx(integral(kernel, 0.0, 90.0), rel=1e-10)
    assert slope.item() == pytest.approx(integral(y * kernel, 0.0, 90.0), rel=1e-9)


def test_the_empirical_influence_function_is_the_gradient_for_any_rewards():
    """`w(u) = integral up to u of N F^(N-1)`, what the empirical weights estimate gap by gap; here for normal
    rewards."""
    n, low, high = 128, -9.0, 9.0
    u = np.linspace(low, high, 400_001)
    slope = n * np.exp((n - 1) * log_ndtr(u))
    w = np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(u))])
    density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    for score, expected in ((u, 1.0), (u * u - 1, expected_max_normal(n))):
        assert np.trapezoid(w * score * density, u) == pytest.approx(expected, abs=1e-6)
    threshold = tail_constants(n, 0.25).z
    share_left_out = np.trapezoid(np.where(u < threshold, slope, 0.0), u)
    assert share_left_out < 1e-13 and ndtr(threshold) == pytest.approx(0.75)


def test_empirical_weights_of_the_whole_group_are_those_of_max_at_k():
    rewards = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 5, 12):
        expected = max_at_k_loo_weights(rewards, n)
        if n == 1:  # RLOO against weights from the smallest reward on: a baseline apart
            expected = rewards - rewards.amin(1, keepdim=True)
        torch.testing.assert_close(empirical_weights(rewards, target_n=n, alpha=1.0), expected)
    assert torch.equal(
        empirical_weights(rewards, target_n=4096, alpha=1.0), empirical_weights(rewards, target_n=12, alpha=1.0)
    )


def test_empirical_weights_leave_out_the_gaps_below_the_threshold():
    """m = 4, N = 3, k = 2: the gap below the best weighs 3, and the best of all 3-subsets starts there with weight
    3."""
    rewards = torch.tensor([[0.0, 1.0, 5.0, 3.0]], dtype=torch.float64)
    assert empirical_weights(rewards, target_n=3, alpha=0.5).tolist() == [[0.0, 0.0, 2.0 * 3.0, 0.0]]
    whole = empirical_weights(rewards, target_n=3, alpha=1.0)[0].tolist()
    assert whole == [0.0, 0.0, 2.0 * 3.0 + 2.0 * 1.0, 2.0 * 1.0]


def test_empirical_weights_are_the_gradient_of_the_measured_best_of_n():
    """They are m times its derivative in the mass of each rollout: check by adding a copy of one rollout."""
    rewards = torch.randn(1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = empirical_weights(rewards, target_n=16, alpha=1.0)
    base = best_of_n(rewards, [16])
    for i in (0, 17):
        more = best_of_n(torch.cat([rewards, rewards[:, i : i + 1]], dim=1), [16])
        centred = weights[0, i] - weights.mean()
        assert 401 * (more - base).item() == pytest.approx(centred.item(), abs=0.05 * weights.max().item())


def test_gpd_weights_share_the_places_of_rewards_tied_at_the_threshold():
    """k = 3 of 12: one reward above the threshold, and two places for three rewards tied at it."""
    rewards = torch.tensor([[5.0, 2.0, 2.0, 2.0] + [-1.0 * j for j in range(8)]], dtype=torch.float64)
    weights = gpd_weights(rewards, target_n=128, alpha=0.25)[0]
    assert weights[1] == weights[2] == weights[3] != 0
    assert weights[4:].count_nonzero() == 0
    broken = gpd_weights(rewards + torch.tensor([[0, 0, 0, -1e-12] + [0.0] * 8]), target_n=128, alpha=0.25)[0]
    assert weights[1:4].sum().item() == pytest.approx(broken[1:4].sum().item(), rel=1e-6)


def test_gpd_weights_follow_the_mean_alone_where_the_shape_is_clipped():
    """Excesses 2, 2, 0: mean 4/3, variance 8/9, so q = 2 and the shape -1/2; excesses 1, 1, 1, 0 of 4: shape -1."""
    rewards = torch.tensor([[4.0, 4.0, 4.0, 4.0, 0.1] + [-5.0 - j for j in range(15)]], dtype=torch.float64)
    weights = gpd_weights(rewards, target_n=128, alpha=0.25)[0]  # k = 5: q = 4, shape -3/2, clipped to -1
    h, _ = expected_max_gpd(column(LOWEST_SHAPE), target_n=128, alpha=0.25)
    mean_excess, by_mean = 0.8 * 3.9, 2 * h.item()
    jump = (1 - by_mean) * 2 * mean_excess / 0.25
    assert weights[4].item() == pytest.approx(jump)
    assert weights[0].item() == pytest.approx(by_mean * 3.9 / 0.25 + jump)


@pytest.mark.parametrize("tail", TAIL_MODELS)
def test_tail_weights_of_two_tails_of_one_prompt_do_not_mix(tail):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    together = tail_weights(rewards, target_n=64, alpha=0.25, tail=tail)
    for row, weights in itertools.islice(zip(rewards, together, strict=True), 3):
        assert torch.equal(tail_weights(row[None], target_n=64, alpha=0.25, tail=tail)[0], weights)


def test_gpd_sample_exactly_on_a_limit_of_the_shape_is_scale_equivariant():
    """One positive excess of three has xi = 1/4: rounding decided whether the shape counted as clipped."""
    rewards = torch.zeros(1, 12, dtype=torch.float64)
    rewards[0, 11] = 0.0625
    weights = gpd_weights(rewards, target_n=128, alpha=0.25)
    for scale in (3.7, 100.0, 1e-3):
        torch.testing.assert_close(gpd_weights(rewards * scale, target_n=128, alpha=0.25), weights * scale)
