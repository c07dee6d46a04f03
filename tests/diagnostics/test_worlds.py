"""Exact gradients of the analytic worlds against closed forms, other integrals, finite differences and Monte Carlo."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq

from tealightning.diagnostics.worlds import MEAN_B, MIXTURE, NAMES, SD_B, build_world, gpd_quantile
from tealightning.functional.max_at_k import max_at_k_loo_weights
from tealightning.functional.tail import expected_max_normal

normal = stats.norm


@pytest.mark.parametrize("target_n", [1, 2, 8, 128, 4096])
def test_gaussian_gradient_is_one_and_c_n(target_n):
    gradient = build_world("gaussian").exact_gradient(target_n)
    expected = torch.tensor([1.0, expected_max_normal(target_n)], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def gpd_derivative(shape: float) -> Callable[[float], float]:
    return lambda z: math.exp(normal.logpdf(z) - (1 + shape) * normal.logsf(z))


def student_derivative(z: float) -> float:
    r = math.copysign(stats.t.isf(normal.sf(abs(z)), 5), z)
    return normal.pdf(z) / stats.t.pdf(r, 5)


def mixture_derivative(z: float) -> float:
    def excess(r: float) -> float:  # log-probability of the smaller tail, so that the root is sharp far out
        tail = MIXTURE.above if z > 0 else MIXTURE.below
        return math.log(float(tail(np.array(r)))) - normal.logsf(abs(z))

    r = brentq(excess, -15.0, 15.0, xtol=1e-14)
    density = 0.85 * normal.pdf(r) + 0.15 * normal.pdf(r, 2, 0.5)
    return normal.pdf(z) / density


@pytest.mark.parametrize("target_n", [1, 16, 512])
@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        ("gpd_-0.3", gpd_derivative(-0.3)),
        ("gpd_0", gpd_derivative(0.0)),
        ("gpd_0.2", gpd_derivative(0.2)),
        ("student_t5", student_derivative),
        ("mixture", mixture_derivative),
        ("bounded", lambda z: 1 - math.tanh(z) ** 2),
    ],
)
def test_gradient_equals_the_expected_derivative_at_the_maximum(name, derivative, target_n):
    # Another formula, E[g'(M) (1, M)], by another quadrature.
    def weighted(z: float) -> float:
        return derivative(z) * target_n * math.exp(normal.logpdf(z) + (target_n - 1) * normal.logcdf(z))

    # g' grows where phi falls: beyond 11 the product is below 1e-20.
    options = {"points": [-2.0, 1.0, 3.0, 5.0], "epsabs": 1e-12, "epsrel": 1e-12, "limit": 300}
    location = quad(weighted, -11, 11, **options)[0]
    log_scale = quad(lambda z: z * weighted(z), -11, 11, **options)[0]
    expected = torch.tensor([location, log_scale], dtype=torch.float64)
    torch.testing.assert_close(build_world(name).exact_gradient(target_n), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target_n", [1, 128])
def test_discrete_gradient_equals_finite_differences(target_n):
    def value(mu: float, log_sigma: float) -> float:
        edges = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
        return float(-np.expm1(target_n * normal.logcdf((edges - mu) / math.exp(log_sigma))).sum())

    h = 1e-4
    expected = [(value(h, 0) - value(-h, 0)) / (2 * h), (value(0, h) - value(0, -h)) / (2 * h)]
    gradient = build_world("discrete").exact_gradient(target_n)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("target_n", [1, 16, 512])
def test_two_arms_gradient_equals_finite_differences(probability, target_n):
    def value(logit: float) -> float:
        p = 1 / (1 + math.exp(-logit))

        def best_below(x: float) -> float:
            return ((1 - p) * normal.cdf(x) + p * normal.cdf(x, MEAN_B, SD_B)) ** target_n

        above = quad(lambda x: 1 - best_below(x), 0, 16, points=[2.0, 5.0], epsabs=1e-12, limit=200)[0]
        return above - quad(best_below, -20, 0, points=[-5.0, -2.0], epsabs=1e-12, limit=200)[0]

    h, logit = 1e-3, math.log(probability / (1 - probability))
    expected = (value(logit + h) - value(logit - h)) / (2 * h)
    gradient = build_world(f"two_arms_{probability}").exact_gradient(target_n)
    assert gradient.tolist() == pytest.approx([expected], rel=1e-5, abs=1e-8)


def test_two_arms_prefers_a_at_small_budgets_and_b_at_large_ones():
    signs = [math.copysign(1, build_world("two_arms").exact_gradient(n)) for n in (1, 16, 128, 512)]
    assert signs == [-1, -1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_monte_carlo_with_unbiased_weights(name):
    world = build_world(name)
    rewards, scores = world.sample(20_000, 16, torch.Generator().manual_seed(1))
    weights = max_at_k_loo_weights(rewards, 8)
    gradients = (weights[..., None] * scores).mean(1)
    errors = gradients.std(0) / len(gradients) ** 0.5
    deviation = (gradients.mean(0) - world.exact_gradient(8)) / errors
    assert (deviation.abs() < 4.5).all(), deviation
    assert (errors < 0.2 * world.exact_gradient(8).norm()).all()  # precise enough to notice


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_from_the_generator_and_scores_have_expectation_0(name):
    world = build_world(name)
    rewards, scores = world.sample(5000, 8, torch.Generator().manual_seed(3))
    again, _ = world.sample(5000, 8, torch.Generator().manual_seed(3))
    assert torch.equal(rewards, again)
    assert rewards.shape == (5000, 8)
    assert scores.shape == (5000, 8, len(world.directions))
    assert rewards.dtype == scores.dtype == torch.float64
    flat = scores.flatten(0, 1)
    assert (flat.mean(0).abs() < 4.5 * flat.std(0) / len(flat) ** 0.5).all()


def test_discrete_rewards_are_eight_tied_marks():
    rewards, _ = build_world("discrete").sample(5000, 16, torch.Generator().manual_seed(0))
    assert rewards.unique().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3])
def test_gpd_quantile_is_accurate_in_the_deep_tail(shape):
    z = np.array([-8.0, -1.0, 0.0, 3.0, 8.0, 12.0])
    expected = stats.genpareto.isf(normal.sf(z), shape)
    np.testing.assert_allclose(gpd_quantile(z, shape)[1:], expected[1:], rtol=1e-12)
    assert gpd_quantile(z, shape)[0] == pytest.approx(normal.cdf(-8.0), rel=1e-12)  # g(z) = Phi(z) where that is small


def test_rewards_of_the_other_worlds_have_their_distribution():
    for name, cdf in (
        ("student_t5", stats.t(5).cdf),
        ("mixture", lambda r: 0.85 * normal.cdf(r) + 0.15 * normal.cdf(r, 2, 0.5)),
        ("gpd_0.2", stats.genpareto(0.2).cdf),
    ):
        rewards, _ = build_world(name).sample(1, 20_000, torch.Generator().manual_seed(2))
        assert stats.kstest(rewards[0].numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gausian", "Did you mean 'gaussian'"),
        ("gpd_0.7", r"shape must be in \[-2, 0.5\)"),
        ("gpd_x", "Unknown world 'gpd_x'"),
        ("two_arms_1.5", r"probability of B must be in \(0, 1\), got 1.5"),
    ],
)
def test_unknown_worlds_and_parameters_are_value_errors(name, message):
    with pytest.raises(ValueError, match=message):
        build_world(name)
