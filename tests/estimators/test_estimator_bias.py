"""Bias and noise of the tail estimators for standard normal rewards at N = 128, alpha = 0.25.

The gradient in (location, log-scale), whose scores are R and R^2 - 1, is (1, c_N). The expected figures were
computed independently of this package.
"""

import pytest
import torch

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
        ("prefix_tea", 16, {"rotations": 1}, (-0.10, -0.98), (1.04, 2.83)),
        ("prefix_tea", 16, {"rotations": 4}, (-0.10, -0.98), (0.98, 2.70)),
        ("prefix_tea", 32, {"rotations": 4}, (-0.16, -0.56), (0.95, 2.66)),
    ],
)
def test_tail_estimators_have_the_known_bias_and_noise(name, m, kwargs, bias, sd):
    measured_bias, measured_sd = bias_and_sd(name, m, **kwargs)
    tolerance = 5 * measured_sd / GROUPS**0.5 + 0.01  # five standard errors, and two printed digits
    expected = torch.tensor(bias, dtype=torch.float64)
    assert ((measured_bias - expected).abs() < tolerance).all(), (measured_bias, expected)
    torch.testing.assert_close(measured_sd, torch.tensor(sd, dtype=torch.float64), rtol=0.05, atol=0)
