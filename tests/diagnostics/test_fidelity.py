"""The figures of gradient fidelity against arithmetic, published values and repeated sampling; slopes."""

import math

import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from tealightning.diagnostics.fidelity import (
    GroupGradients,
    controlled_mean,
    fidelity,
    fit_log_slope,
    group_controls,
    group_gradients,
    norm_of_mean,
    sample_chunks,
    truncated_moments,
)
from tealightning.diagnostics.worlds import build_world
from tealightning.estimators import build_estimator

TRUTH = torch.tensor([3.0, 4.0], dtype=torch.float64)
DIRECTIONS = ("location", "log-scale")


def synthetic(mean: tuple[float, float], sd: tuple[float, float], groups: int, seed: int = 0) -> GroupGradients:
    noise = torch.randn(groups, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.tensor(mean, dtype=torch.float64) + noise * torch.tensor(sd, dtype=torch.float64)
    return GroupGradients(
        gradients=gradients,
        energy=torch.full((groups,), 6.25, dtype=torch.float64),
        zeros=torch.full((groups,), 0.75, dtype=torch.float64),
    )


def test_figures_of_a_known_gradient():
    figures = fidelity(synthetic((4.0, 3.0), (2.0, 1.0), 200_000), TRUTH, DIRECTIONS)
    cosine = 24 / 25
    expected = {
        "bias[location]": 1.0,
        "bias[log-scale]": -1.0,
        "bias": math.sqrt(2),
        "normalised_bias": math.sqrt(2) / 5,
        "cosine": cosine,
        "scaled_bias": 7 / 25,  # the sine of the same angle
        "signal": 24 / 5,
        "sd[location]": 2.0,
        "sd": math.sqrt(5),
        "noise_over_signal": math.sqrt(5) / 4.8,
        "rms_advantage": 2.5,
        "rms_advantage_over_signal": 2.5 / 4.8,
        "rmse@1": math.sqrt(2 + 5),
        "rmse@32": math.sqrt(2 + 5 / 32),
        "scaled_rmse@1": math.sqrt(1 - 4.8**2 / (25 + 5)),
        "zeros": 0.75,
        "sign_agreement@1": (stats.norm.cdf(2) + stats.norm.cdf(3)) / 2,
        "true_norm": 5.0,
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=max(1e-9, 4.5 * figures[f"{name}_se"])), name
        assert figures[f"{name}_se"] < 0.02, name


def test_standard_errors_are_the_spread_of_repeated_measurements():
    repeats = [fidelity(synthetic((4.0, 3.0), (2.0, 1.0), 1024, seed), TRUTH, DIRECTIONS) for seed in range(150)]
    for name in (
        "bias",
        "cosine",
        "scaled_bias",
        "sd",
        "rmse@32",
        "scaled_rmse@1",
        "step_cosine@1",
        "sign_agreement@1",
    ):
        values = torch.tensor([r[name] for r in repeats], dtype=torch.float64)
        claimed = torch.tensor([r[f"{name}_se"] for r in repeats], dtype=torch.float64).mean()
        assert float(values.std() / claimed) == pytest.approx(1.0, abs=0.25), name  # the sd of 150 is known to 6%


def test_scaled_figures_ignore_the_scale_of_the_advantages():
    groups = synthetic((4.0, 3.0), (2.0, 1.0), 2048)
    smaller = GroupGradients(gradients=groups.gradients / 8, energy=groups.energy / 64, zeros=groups.zeros)
    one, other = fidelity(groups, TRUTH, DIRECTIONS), fidelity(smaller, TRUTH, DIRECTIONS)
    for name in ("cosine", "scaled_bias", "scaled_rmse@1", "scaled_rmse@256", "noise_over_signal", "step_cosine@32"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)
        assert other[f"{name}_se"] == pytest.approx(one[f"{name}_se"], rel=1e-6)
    assert other["bias"] > 2 * one["bias"]


def test_a_gradient_against_the_truth_has_no_noise_to_signal_ratio():
    figures = fidelity(synthetic((-3.0, -4.0), (1.0, 1.0), 1024), TRUTH, DIRECTIONS)
    assert math.isnan(figures["noise_over_signal"])
    assert figures["scaled_bias"] == 1.0
    assert figures["sign_agreement@32"] == 0.0


def test_an_estimator_that_is_always_0_has_neither_direction_nor_sign():
    groups = GroupGradients(
        gradients=torch.zeros(512, 2, dtype=torch.float64),
        energy=torch.zeros(512, dtype=torch.float64),
        zeros=torch.ones(512, dtype=torch.float64),
    )
    values = fidelity(groups, TRUTH, DIRECTIONS)
    assert values["bias"] == 5.0
    assert values["step_cosine@1"] == values["sign_agreement@1"] == 0.0
    assert values["scaled_rmse@32"] == 1.0
    assert math.isnan(values["cosine"])


def test_norm_of_a_noisy_mean_of_zero_is_zero_within_its_error():
    covariance = torch.diag(torch.tensor([0.04, 0.01], dtype=torch.float64))
    draws = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ covariance.sqrt()
    squares = [norm_of_mean(draw, covariance) for draw in draws]
    assert sum(value == 0 for value, _ in squares) > 150  # a plain norm would never be 0
    assert max(value for value, _ in squares) < 0.75
    assert all(0.05 < error < 0.35 for _, error in squares)
    assert norm_of_mean(torch.tensor([3.0, 4.0]), torch.zeros(2, 2)) == (5.0, 0.0)


@pytest.mark.parametrize(
    ("name", "m", "bias", "noise", "rms"),
    [
        ("direct", 16, 1.36, 1.70, 1.33),
        ("prefix_tea", 16, 0.98, 1.59, 1.25),
        ("direct", 32, 0.86, 1.25, 1.27),
        ("prefix_tea", 32, 0.57, 1.31, 1.33),
        ("direct", 64, 0.50, 0.90, 1.23),
    ],
)
def test_noise_table_of_the_tail_estimators(name, m, bias, noise, rms):
    world = build_world("gaussian")
    groups = group_gradients({name: build_estimator(name, target_n=128, alpha=0.25)}, world, m, groups=20_000, seed=1)
    figures = fidelity(groups[name], world.exact_gradient(128), world.directions)
    for key, expected in (("bias", bias), ("noise_over_signal", noise), ("rms_advantage_over_signal", rms)):
        # Five standard errors of this run, and 2% for the table's own sampling and rounding.
        assert figures[key] == pytest.approx(expected, abs=5 * figures[f"{key}_se"] + 0.02 * expected), key


def test_groups_depend_on_seed_world_and_m_only():
    world = build_world("gaussian")
    both = {"grpo": build_estimator("grpo"), "direct": build_estimator("direct")}
    alone = group_gradients({"direct": both["direct"]}, world, 512, groups=700, seed=0)  # two chunks
    together = group_gradients(both, world, 512, groups=700, seed=0)
    assert torch.equal(alone["direct"].gradients, together["direct"].gradients)
    assert alone["direct"].gradients.shape == (700, 2)
    other = group_gradients({"direct": both["direct"]}, world, 512, groups=700, seed=1)
    assert not torch.equal(alone["direct"].gradients, other["direct"].gradients)


def test_group_gradients_are_the_mean_of_advantages_times_scores():
    world, estimator = build_world("gpd_0.2"), build_estimator("direct", target_n=64)
    rewards, scores = next(iter(sample_chunks(world, 16, groups=5, seed=4)))
    advantages = estimator(rewards)
    groups = group_gradients({"direct": estimator}, world, 16, groups=5, seed=4)["direct"]
    torch.testing.assert_close(groups.gradients, (advantages[..., None] * scores).mean(1))
    torch.testing.assert_close(groups.energy, advantages.square().mean(1))
    assert groups.zeros.tolist() == [13 / 16] * 5  # all but the top ceil(16/4) - 1


# ---------------------------------------------------------------- slopes


@pytest.mark.parametrize("threshold", [-1.0, 0.6745, 2.0])
def test_truncated_moments_equal_their_integrals(threshold):
    for p, moment in enumerate(truncated_moments(threshold, 5)):
        expected = quad(lambda z, p=p: z**p * stats.norm.pdf(z), threshold, 12, epsabs=1e-13)[0]
        assert moment == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_controls_have_expectation_0(alpha):
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    controls = group_controls(z, alpha)
    assert (controls.mean(0).abs() < 4.5 * controls.std(0) / len(z) ** 0.5).all()


def test_controls_leave_the_mean_and_lower_the_error():
    world, estimator = build_world("gaussian"), build_estimator("direct", target_n=128)
    plain = group_gradients({"direct": estimator}, world, 64, groups=10_000, seed=0)["direct"].gradients
    z = torch.cat([scores[..., 0] for _, scores in sample_chunks(world, 64, groups=10_000, seed=0)])
    mean, covariance = controlled_mean(plain, group_controls(z, 0.25))
    errors, plain_errors = covariance.diagonal().sqrt(), plain.std(0) / 100
    assert (errors < 0.5 * plain_errors).all()
    assert ((mean - plain.mean(0)).abs() < 4.5 * plain_errors).all()
    # The claimed error is the spread between independent halves.
    halves = [
        controlled_mean(plain[half], group_controls(z[half], 0.25)) for half in (slice(0, 5000), slice(5000, None))
    ]
    spread = (halves[0][1] + halves[1][1]).diagonal().sqrt()
    assert ((halves[0][0] - halves[1][0]).abs() < 4.5 * spread).all()


def test_slope_of_a_power_law_and_its_error():
    x = torch.tensor([64.0, 128.0, 256.0, 512.0], dtype=torch.float64)
    exact = 3 * x**-1.5
    fit = fit_log_slope(x, exact, 0.05 * exact)
    assert fit is not None
    assert fit.slope == pytest.approx(-1.5, abs=1e-12)
    assert fit.misfit == 1.0
    generator = torch.Generator().manual_seed(0)
    slopes = []
    for _ in range(400):
        noisy = exact * (1 + 0.05 * torch.randn(4, generator=generator, dtype=torch.float64))
        slopes.append(fit_log_slope(x, noisy, 0.05 * exact).slope)
    assert torch.tensor(slopes).std().item() == pytest.approx(fit.slope_error, rel=0.15)


def test_slope_leaves_out_what_is_lost_in_the_noise():
    x = torch.tensor([64.0, 128.0, 256.0], dtype=torch.float64)
    fit = fit_log_slope(x, torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64), torch.full((3,), 0.01).double())
    assert fit is not None
    assert (fit.points, round(fit.slope, 9)) == (2, -1.0)
    assert fit_log_slope(x, torch.tensor([1.0, 0.0, 0.0]).double(), torch.full((3,), 0.1).double()) is None


def test_slope_of_a_curve_has_a_wider_interval():
    x = torch.tensor([16.0, 64.0, 256.0], dtype=torch.float64)
    curved = torch.tensor([1.0, 0.5, 0.05], dtype=torch.float64)
    fit = fit_log_slope(x, curved, 0.01 * curved)
    assert fit is not None
    assert fit.misfit > 10
    assert fit.interval[1] - fit.interval[0] == pytest.approx(2 * 1.96 * fit.slope_error * fit.misfit)
