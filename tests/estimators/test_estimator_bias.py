"""Bias and noise of the tail estimators for standard normal rewards at N = 128, alpha = 0.25.

The gradient in (location, log-scale), whose scores are R and R^2 - 1, is (1, c_N). The expected figures were
computed independently of this package.
"""

import pytest
import torch

from tealightning.diagnostics.fidelity import (
    SlopeFit,
    controlled_mean,
    fit_log_slope,
    group_controls,
    group_gradients,
    norm_of_mean,
    sample_chunks,
)
from tealightning.diagnostics.worlds import build_world
from tealightning.estimators import build_estimator
from tealightning.functional.tail import expected_max_normal

GROUPS = 30_000


def bias_and_sd(name: str, m: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = torch.randn(GROUPS, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    advantages = build_estimator(name, target_n=128, alpha=0.25, **kwargs)(rewards)
    gradients = torch.stack([(advantages * rewards).mean(1), (advantages * (rewards**2 - 1)).mean(1)], dim=1)
    truth = torch.tensor([1.0, expected_max_normal(128)], dtype=torch.float64)
    return gradients.mean(0) - truth, gradients.std(0)


@pytest.mark.parametrize(
    ("name", "m", "kwargs", "bias", "sd"),
    [
        ("direct", 16, {}, (-0.34, -1.31), (0.85, 2.28)),
        ("direct", 32, {}, (-0.23, -0.83), (0.82, 2.26)),
        ("direct", 64, {}, (-0.14, -0.48), (0.68, 1.96)),
        ("direct", 128, {}, (-0.075, -0.264), (0.53, 1.57)),
        ("prefix_tea", 16, {"rotations": 1}, (-0.10, -0.98), (1.04, 2.83)),
        ("prefix_tea", 16, {"rotations": 4}, (-0.10, -0.98), (0.98, 2.70)),
        ("prefix_tea", 32, {"rotations": 1}, (-0.16, -0.56), (1.04, 2.83)),
        ("prefix_tea", 32, {"rotations": 4}, (-0.16, -0.56), (0.95, 2.66)),
        ("prefix_tea", 64, {"rotations": 1}, (-0.08, -0.25), (0.87, 2.42)),
        ("prefix_tea", 64, {"rotations": 4}, (-0.08, -0.25), (0.78, 2.22)),
        ("prefix_tea", 128, {"rotations": 1}, (-0.032, -0.098), (0.68, 1.94)),
        pytest.param("prefix_tea", 128, {"rotations": 4}, (-0.032, -0.098), (0.59, 1.73), marks=pytest.mark.slow),
    ],
)
def test_tail_estimators_have_the_known_bias_and_noise(name, m, kwargs, bias, sd):
    measured_bias, measured_sd = bias_and_sd(name, m, **kwargs)
    tolerance = 5 * measured_sd / GROUPS**0.5 + 0.01  # five standard errors, and two printed digits
    expected = torch.tensor(bias, dtype=torch.float64)
    assert ((measured_bias - expected).abs() < tolerance).all(), (measured_bias, expected)
    torch.testing.assert_close(measured_sd, torch.tensor(sd, dtype=torch.float64), rtol=0.05, atol=0)


def bias_slope(name: str, groups: int) -> SlopeFit:
    """Slope of log |bias| in log m over m = 64..512; the bias by control variates, which make it three (m = 64) to
    seven times (m = 512) as precise as a plain mean."""
    world, estimator = build_world("gaussian"), build_estimator(name, target_n=128, alpha=0.25)
    sizes = (64, 128, 256, 512)
    norms = []
    for m in sizes:
        found = group_gradients({name: estimator}, world, m, groups=groups, seed=0)[name].gradients
        z = torch.cat([group_controls(s[..., 0], 0.25) for _, s in sample_chunks(world, m, groups=groups, seed=0)])
        mean, covariance = controlled_mean(found, z)
        norms.append(norm_of_mean(mean - world.exact_gradient(128), covariance))
    bias, error = torch.tensor(norms, dtype=torch.float64).T
    fit = fit_log_slope(torch.tensor(sizes, dtype=torch.float64), bias, error)
    assert fit is not None
    assert fit.points == len(sizes)
    return fit


def test_bias_of_direct_falls_like_one_over_m():
    fit = bias_slope("direct", groups=10_000)
    assert fit.slope_error < 0.015
    assert fit.slope == pytest.approx(-1.0, abs=0.15)


@pytest.mark.slow
def test_bias_of_prefix_tea_falls_faster():
    # About -1.50 over this range, and steeper still at its end: at 40,000 groups -1.4 is four standard errors away.
    fit = bias_slope("prefix_tea", groups=40_000)
    assert fit.slope_error < 0.03
    assert fit.slope <= -1.4
