"""The figures of gradient fidelity against arithmetic, published values and repeated sampling; slopes; specs; rows."""

import math

import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from tealightning.diagnostics.fidelity import (
    GroupGradients,
    fidelity,
    group_gradients,
    norm_of_mean,
    sample_chunks,
)
from tealightning.diagnostics.fidelity_plots import PLOTS
from tealightning.diagnostics.fidelity_tables import measured
from tealightning.diagnostics.measurements import (
    Cell,
    default_estimators,
    measure,
    parse_estimator,
    parse_estimators,
    sweep_cells,
    takes_part,
    try_out,
)
from tealightning.diagnostics.slopes import controlled_mean, fit_log_slope, group_controls, truncated_moments
from tealightning.diagnostics.worlds import build_world
from tealightning.estimators import build_estimator, estimator_names

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
    found = fidelity(synthetic((4.0, 3.0), (2.0, 1.0), 200_000), TRUTH, DIRECTIONS)
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
        assert found.values[name] == pytest.approx(value, abs=max(1e-9, 4.5 * found.errors[name])), name
        assert found.errors[name] < 0.02, name


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
        values = torch.tensor([r.values[name] for r in repeats], dtype=torch.float64)
        claimed = torch.tensor([r.errors[name] for r in repeats], dtype=torch.float64).mean()
        assert float(values.std() / claimed) == pytest.approx(1.0, abs=0.25), name  # the sd of 150 is known to 6%


def test_scaled_figures_ignore_the_scale_of_the_advantages():
    found = synthetic((4.0, 3.0), (2.0, 1.0), 2048)
    smaller = GroupGradients(gradients=found.gradients / 8, energy=found.energy / 64, zeros=found.zeros)
    one, other = fidelity(found, TRUTH, DIRECTIONS), fidelity(smaller, TRUTH, DIRECTIONS)
    for name in ("cosine", "scaled_bias", "scaled_rmse@1", "scaled_rmse@256", "noise_over_signal", "step_cosine@32"):
        assert other.values[name] == pytest.approx(one.values[name], rel=1e-9)
        assert other.errors[name] == pytest.approx(one.errors[name], rel=1e-6)
    assert other.values["bias"] > 2 * one.values["bias"]


def test_a_gradient_against_the_truth_has_no_noise_to_signal_ratio():
    found = fidelity(synthetic((-3.0, -4.0), (1.0, 1.0), 1024), TRUTH, DIRECTIONS)
    assert math.isnan(found.values["noise_over_signal"])
    assert found.values["scaled_bias"] == 1.0
    assert found.values["sign_agreement@32"] == 0.0


def test_an_estimator_that_is_always_0_has_neither_direction_nor_sign():
    found = GroupGradients(
        gradients=torch.zeros(512, 2, dtype=torch.float64),
        energy=torch.zeros(512, dtype=torch.float64),
        zeros=torch.ones(512, dtype=torch.float64),
    )
    values = fidelity(found, TRUTH, DIRECTIONS).values
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
    found = group_gradients({name: build_estimator(name, target_n=128, alpha=0.25)}, world, m, groups=20_000, seed=1)
    figures = fidelity(found[name], world.exact_gradient(128), world.directions)
    for key, expected in (("bias", bias), ("noise_over_signal", noise), ("rms_advantage_over_signal", rms)):
        # Five standard errors of this run, and 2% for the table's own sampling and rounding.
        assert figures.values[key] == pytest.approx(expected, abs=5 * figures.errors[key] + 0.02 * expected), key


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
    found = group_gradients({"direct": estimator}, world, 16, groups=5, seed=4)["direct"]
    torch.testing.assert_close(found.gradients, (advantages[..., None] * scores).mean(1))
    torch.testing.assert_close(found.energy, advantages.square().mean(1))
    assert found.zeros.tolist() == [13 / 16] * 5  # all but the top ceil(16/4) - 1


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
    assert math.exp(fit.intercept) == pytest.approx(3)
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


# ---------------------------------------------------------------- estimators by name


def test_every_registered_estimator_is_measured_by_default():
    labels = [spec.label for spec in default_estimators()]
    assert set(estimator_names()) <= set(labels)
    assert "tea[scale=none]" in labels
    assert len(labels) == len(set(labels))


def test_arguments_are_filled_in_where_the_constructor_has_them():
    assert vars(parse_estimator("max_at_k").build(m=16, target_n=128, alpha=0.5))["k"] == 16
    assert vars(parse_estimator("max_at_k").build(m=16, target_n=4, alpha=0.5))["k"] == 4
    tea = parse_estimator("TEA:alpha=0.5,scale=none").build(m=16, target_n=64, alpha=0.25)
    assert (tea.target_n, tea.alpha, tea.scale) == (64, 0.5, "none")
    assert parse_estimator("TEA:alpha=0.5,scale=none").label == "tea[alpha=0.5,scale=none]"
    assert len(parse_estimators(["tea", "TEA", "direct"])) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("te", "Unknown estimator 'te'.*Did you mean"),
        ("tea:scale", "NAME:PARAMETER=VALUE"),
        ("tea:=1", "NAME:PARAMETER=VALUE"),
    ],
)
def test_bad_estimators_are_value_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_estimator(text)


def test_wrong_arguments_are_reported_before_the_work():
    cell = Cell(sweep="main", world="gaussian", m=16, target_n=128, alpha=0.25)
    with pytest.raises(ValueError, match="has no parameter 'scael'"):
        measure([cell], parse_estimators(["direct", "tea:scael=none"]), groups=512, seed=0)


def test_trial_knows_units_refusals_and_warnings():
    assert try_out(build_estimator("direct"), 16).reward_units
    assert not try_out(build_estimator("grpo"), 16).reward_units
    assert "needs at least 8 rollouts" in try_out(build_estimator("max_at_k", k=8), 4).refused
    assert "the tail has 2 rollouts" in try_out(build_estimator("direct"), 8).warned


def test_an_estimator_that_refuses_negative_rewards_is_measured_where_there_are_none():
    cells = [Cell(sweep="main", world=world, m=8, target_n=16, alpha=0.25) for world in ("gaussian", "gpd_0")]
    gaussian, exponential = measure(cells, parse_estimators(["max_rl"]), groups=512, seed=0)
    assert "cosine" not in gaussian and "max_rl takes rewards of at least 0, got -" in gaussian["note"]
    assert exponential["note"] == "" and exponential["cosine"] > 0


def test_rows_keep_the_order_and_say_what_is_refused():
    specs = parse_estimators(["grpo", "max_at_k:k=16", "direct"])
    cells = [Cell(sweep="main", world="two_arms", m=m, target_n=n, alpha=0.25) for m in (8, 16) for n in (16, 128)]
    rows = measure(cells, specs, groups=512, seed=0)
    assert [row["estimator"] for row in rows] == ["grpo", "max_at_k[k=16]", "direct"] * 4
    assert [(row["m"], row["target_n"]) for row in rows[::3]] == [(8, 16), (8, 128), (16, 16), (16, 128)]
    refused = [row for row in rows if "cosine" not in row]
    assert [(row["estimator"], row["m"]) for row in refused] == [("max_at_k[k=16]", 8)] * 2
    assert all("needs at least 16 rollouts" in row["note"] for row in refused)
    # The same gradients against two truths.
    grpo = [row for row in rows if row["estimator"] == "grpo" and row["m"] == 16]
    truths = [build_world("two_arms").exact_gradient(n).item() for n in (16, 128)]
    shift = grpo[0]["bias[logit of B]"] - grpo[1]["bias[logit of B]"]
    assert shift == pytest.approx(truths[1] - truths[0], rel=1e-9)


def test_sweeps_draw_their_plots(tmp_path):
    specs = parse_estimators(["grpo", "direct", "tea:alpha=0.5", "max_at_k"])
    for sweep, files in PLOTS.items():
        cells = [c for c in sweep_cells(sweep, m=16, target_n=64, alpha=0.25) if c.m <= 64]
        rows = measure(cells, specs, groups=512, seed=0)
        taking_part = {spec.label for spec in specs if takes_part(spec, sweep)}
        assert {row["estimator"] for row in rows} == taking_part
        for name, draw in files:
            draw(rows, tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not takes_part(specs[0], "alpha")
    assert not takes_part(specs[2], "alpha")
    assert takes_part(specs[2], "tail")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (-0.3437, 0.0056, "-0.344 ± 0.006"),
        (25.91, 1.4, "26 ± 1"),
        (0.99912, 0.00003, "0.99912 ± 0.00003"),
        (1.0, 0.0, "1.000"),
        (math.nan, 0.1, "-"),
    ],
)
def test_figures_are_shown_with_as_many_digits_as_they_have(value, error, shown):
    assert measured({"x": value, "x_se": error}, "x") == shown
    assert measured({}, "x") == "-"
