import math

import numpy as np
import pytest
import torch

from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.tail import expected_max_normal, extrapolated_best_of_n
from tealightning.functional.tail_checks import (
    _num_distinct,
    _tied_share,
    check_tail,
    equal_samples,
    summarise,
    tie_cause,
    tied,
)
from tealightning.functional.tail_shape import (
    _predict_held_out,
    expected_normal_order_statistics,
    gaussian_prediction_error,
    gaussian_tail_null,
    held_out_best_of_n,
    pooled_shape,
    prediction_budgets,
    pwm_shape,
    qq_r2,
    standardised_tail,
)

NAN = float("nan")


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def upper(values, k):
    return values.topk(k, dim=1).values


def pareto(shape, *size, seed=0):
    """Generalised Pareto values with scale 1."""
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(size))
    return -uniforms.log() if shape == 0 else (uniforms**-shape - 1) / shape


# ---------------------------------------------------------------- the Gaussian line


def test_order_statistics_are_those_of_the_tables():
    expected = [1.1629644736, 0.4950189705, 0.0, -0.4950189705, -1.1629644736]  # Harter 1961, m = 5
    torch.testing.assert_close(
        expected_normal_order_statistics(5, 5), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("m", [1, 2, 3, 16, 128, 1000])
def test_the_largest_order_statistic_is_the_expected_maximum(m):
    assert float(expected_normal_order_statistics(m, 1)[0]) == pytest.approx(expected_max_normal(m), abs=1e-10)


def test_order_statistics_satisfy_the_recurrence_over_sample_sizes():
    """Dropping one of m at random: (m - j) E[Z_(j:m)] + j E[Z_(j+1:m)] = m E[Z_(j:m-1)], ranks from the top."""
    m = 40
    larger, smaller = expected_normal_order_statistics(m, m), expected_normal_order_statistics(m - 1, m - 1)
    j = torch.arange(1, m, dtype=torch.float64)
    torch.testing.assert_close((m - j) * larger[:-1] + j * larger[1:], m * smaller, rtol=0, atol=1e-9)


def test_qq_r2_is_a_squared_correlation():
    tail = upper(normal(3, 40), 10)
    expected = expected_normal_order_statistics(40, 10).numpy()
    for found, row in zip(qq_r2(tail, 40), tail.numpy(), strict=True):
        assert float(found) == pytest.approx(np.corrcoef(row, expected)[0, 1] ** 2, abs=1e-12)
    torch.testing.assert_close(qq_r2(1e200 * tail, 40), qq_r2(tail, 40), rtol=1e-12, atol=0)
    line = 3.0 + 2.0 * expected_normal_order_statistics(40, 10)[None]
    assert float(qq_r2(line, 40)) == pytest.approx(1.0, abs=1e-12)


def test_qq_r2_of_a_tail_without_spread_is_nan():
    assert qq_r2(torch.full((1, 8), 0.1, dtype=torch.float64), 32).isnan().all()


def test_five_percent_of_gaussian_prompts_are_rejected():
    checks = check_tail(normal(4000, 64, seed=7))
    assert float((checks.qq_p < 0.05).double().mean()) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 4000))
    assert float(checks.qq_p.mean()) == pytest.approx(0.5, abs=3 / math.sqrt(12 * 4000))


def test_standardised_tails_have_the_gaussian_mean_and_spread():
    expected = expected_normal_order_statistics(32, 8)
    found = standardised_tail(upper(7 + 3 * normal(2, 32), 8), 32)
    for row in found:
        assert float(row.mean()) == pytest.approx(float(expected.mean()))
        assert float(row.std()) == pytest.approx(float(expected.std()))
    assert standardised_tail(torch.ones(1, 8, dtype=torch.float64), 32).isnan().all()


# ---------------------------------------------------------------- the Pareto shape


def test_pwm_shape_by_hand():
    """Excesses 3 and 1: mean 2, half their difference 1, shape 2 - 2/1. Excesses 2 and 1: 2 - 1.5/0.5."""
    tail = torch.tensor([[4.0, 2.0, 1.0], [4.0, 3.0, 2.0], [5.0, 5.0, 1.0]], dtype=torch.float64)
    found = pwm_shape(tail)
    assert found[:2].tolist() == [0.0, -1.0]
    assert found[2].isnan()


@pytest.mark.parametrize("k", [8, 32])
@pytest.mark.parametrize("shape", [-1.0, -0.5, 0.0, 0.2, 0.4])
def test_the_pooled_shape_of_pareto_tails_is_theirs(shape, k):
    """The whole sample is a tail: excesses over its smallest value are Pareto again. Prompts differ in scale."""
    values = pareto(shape, 3000, k, seed=3) * torch.linspace(0.1, 10, 3000, dtype=torch.float64)[:, None]
    shapes = pwm_shape(upper(values, k))
    found = pooled_shape(shapes, 4 * k, k)
    slack = 0.012 if k == 8 else 0.006  # the simulated bias has an error too
    assert float(found.shape) == pytest.approx(shape, abs=3 * float(found.standard_error) + slack)
    assert int(found.num_prompts) == 3000


def test_without_the_correction_short_tails_would_look_lighter():
    shapes = pwm_shape(upper(pareto(0.2, 3000, 8, seed=3), 8))
    assert float(shapes.mean()) < 0.1
    assert float(pooled_shape(shapes, 32, 8).shape) > 0.15


def test_gaussian_samples_have_the_gaussian_shape():
    """Over a thousand prompts, independent of the simulation behind the reference; and it is negative."""
    for share, shape in ((None, -0.41), (0.25, -0.26)):
        found = check_tail(normal(1000, 128, seed=11), tested_share=share).shape
        assert float(found.gaussian) == pytest.approx(shape, abs=0.01)
        assert float(found.shape - found.gaussian) == pytest.approx(0, abs=3 * float(found.standard_error))


def test_the_standard_error_of_the_shape_is_that_of_repetition():
    found = [check_tail(normal(64, 64, seed=seed)).shape for seed in range(60)]
    shapes = torch.stack([fit.shape for fit in found])
    errors = torch.stack([fit.standard_error for fit in found])
    assert float(shapes.std() / errors.mean()) == pytest.approx(1.0, abs=0.25)


def test_simulations_are_the_same_every_time():
    first = gaussian_tail_null(24, 6)
    gaussian_tail_null.cache_clear()
    assert torch.equal(first.r2, gaussian_tail_null(24, 6).r2)


# ---------------------------------------------------------------- predictions


def test_predictions_come_from_a_group_and_measurements_from_the_others():
    samples = normal(5, 24)
    predicted, measured, spread = _predict_held_out(samples, 8, (4, 16), 0.5, num_groups=3)
    assert predicted.shape == measured.shape == (5, 3, 2)
    group, others = samples[:, 8:16], torch.cat([samples[:, :8], samples[:, 16:]], dim=1)
    torch.testing.assert_close(predicted[:, 1], extrapolated_best_of_n(group, (4, 16), alpha=0.5))
    torch.testing.assert_close(measured[:, 1], best_of_n(others, (4, 16)))
    torch.testing.assert_close(spread[:, 1, 0], group.topk(4).values.std(dim=1, correction=0))


def test_budgets_are_what_the_held_out_samples_can_measure():
    assert prediction_budgets(16, 128) == (4, 8, 16, 32, 64, 112)
    assert prediction_budgets(16, 32) == (4, 8, 16)


@pytest.mark.parametrize("m", [8, 16, 32])
def test_the_error_for_gaussian_rewards_is_the_plug_ins_bias(m):
    samples = normal(6000, 96, seed=5) * 3 + 1
    ns = (4, 32, 64)
    found = held_out_best_of_n(samples, m, alpha=0.25, ns=ns).error
    expected = gaussian_prediction_error(96, m, ns, 0.25)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - expected).abs() < 4 * error + 0.003).all()
    assert (expected < 0).all()


@pytest.mark.parametrize(("m", "width"), [(16, 128), (8, 40)])
def test_the_interval_covers_ninety_percent_of_gaussian_rewards(m, width):
    scale = torch.linspace(0.1, 10, 3000, dtype=torch.float64)[:, None]
    covered = check_tail(scale * normal(3000, width, seed=9) - 5, m=m).held_out.covered
    assert (covered.mean(dim=0) - 0.9).abs().max() < 0.01


def test_the_interval_misses_heavy_tails():
    rewards = torch.from_numpy(np.random.default_rng(0).standard_t(3, (300, 128)))
    assert float(summarise(check_tail(rewards))["tail_coverage"]) < 0.82


def test_a_constant_prompt_has_no_prediction():
    samples = torch.cat([normal(1, 32), torch.full((1, 32), 0.1, dtype=torch.float64)])
    found = held_out_best_of_n(samples, 16, alpha=0.25, ns=(4, 16))
    assert found.error[0].isfinite().all()
    for values in (found.error, found.covered, found.predicted, found.measured):
        assert values[1].isnan().all()


# ---------------------------------------------------------------- samples, ties, all together


def test_prompts_are_brought_to_the_number_that_keeps_most_samples():
    """4, 4, 3 and 1 samples: three prompts with 3 keep 9, two with 4 keep 8."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, NAN, 10.0, 11.0], [12.0, NAN, NAN, NAN]])
    rows, samples = equal_samples(rewards)
    assert rows.tolist() == [0, 1, 2]
    assert samples.shape == (3, 3)
    assert samples[2].sort().values.tolist() == [9.0, 10.0, 11.0]
    for row in (0, 1):
        kept = set(samples[row].tolist())
        assert len(kept) == 3 and kept < set(rewards[row].tolist())


def test_valid_leaves_samples_out():
    rewards = torch.arange(6.0).reshape(2, 3)
    rows, samples = equal_samples(rewards, torch.tensor([[True, False, True], [False, False, False]]))
    assert rows.tolist() == [0]
    assert samples.sort().values.tolist() == [[0.0, 2.0]]


def test_the_order_of_the_samples_does_not_matter_and_becomes_random():
    ascending = torch.arange(200.0, dtype=torch.float64).repeat(50, 1)
    shuffled = ascending[:, torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    _, samples = equal_samples(ascending)
    assert torch.equal(samples, equal_samples(shuffled)[1])
    assert float(samples[:, :16].mean()) == pytest.approx(99.5, abs=4 * 57.7 / math.sqrt(800))
    assert not torch.equal(samples, equal_samples(ascending, seed=1)[1])


def test_ties_and_distinct_values_by_hand():
    samples = torch.tensor([[5.0, 5.0, 4.0, 3.0, 3.0, 1.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert _tied_share(samples, upper(samples, 4)).tolist() == [0.75, 0.0]  # 5, 5 and the 3 with a twin below the cut
    assert _num_distinct(samples).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("width", "expected"),
    [(4, {"ties"}), (16, {"ties", "qq", "shape"}), (32, {"ties", "qq", "shape", "prediction", "coverage"})],
)
def test_what_there_are_too_few_samples_for_has_no_key(width, expected):
    assert {key.split("_")[1] for key in summarise(check_tail(normal(20, width)))} == expected


def test_the_summary_does_not_depend_on_location_and_scale():
    rewards = normal(30, 64)
    moved = 10 + 4 * rewards  # by powers of 2, so that rounding keeps the ranks; other samples form a group
    one, other = summarise(check_tail(rewards)), summarise(check_tail(moved))
    for key in ("tail_ties", "tail_qq_r2", "tail_qq_rejected", "tail_shape", "tail_shape_se", "tail_shape_gaussian"):
        assert float(one[key]) == pytest.approx(float(other[key]), abs=1e-9), key


@pytest.mark.parametrize("rewards", [torch.full((3, 64), NAN), torch.zeros(0, 8), torch.zeros(4, 0)])
def test_nothing_to_look_at_is_nan(rewards):
    checks = check_tail(rewards)
    assert len(checks.rows) == 0
    assert all(value.isnan() for value in summarise(checks).values())


def test_constant_prompts_count_in_the_ties_only():
    rewards = torch.cat([normal(20, 64), torch.full((20, 64), 2.5, dtype=torch.float64)])
    found, alone = summarise(check_tail(rewards)), summarise(check_tail(rewards[:20]))
    assert float(found["tail_ties"]) == 0.5
    assert float(found["tail_shape"]) == pytest.approx(float(alone["tail_shape"]))
    assert check_tail(rewards).held_out.error[20:].isnan().all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"fewer than 2 of m=4 samples .*raise m or alpha"):
        check_tail(normal(2, 32), m=4)
    with pytest.raises(ValueError, match=r"ns must lie between 1 and M - m = 32 - 16 = 16, got \[4, 17\]"):
        check_tail(normal(2, 32), ns=[4, 17])


def scores(seed=0, *, mean=0.0, std=1.0, shape=(8, 16)):
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cause(rewards):
    rewards = rewards.double()
    return tie_cause(rewards, tied(rewards, []))


def test_tied_is_the_same_reward_for_another_text_of_the_same_prompt():
    rewards = torch.tensor([[1.0, 1.0, 2.0], [1.0, 3.0, 3.0]])
    assert tied(rewards, ["a", "b", "c", "a", "d", "d"]).tolist() == [[True, True, False], [False, False, False]]
    assert tied(rewards, []).tolist() == [[True, True, False], [False, True, True]]


def test_tied_leaves_unscorable_rewards_out():
    rewards = torch.tensor([[math.nan, math.nan, 1.0]])
    assert not tied(rewards, ["a", "b", "c"]).any()
    assert tie_cause(rewards, tied(rewards, ["a", "b", "c"])) is None


@pytest.mark.parametrize("mean", [-3.0, 10.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_rounded_to_half_precision_are_told_by_their_type(mean, dtype):
    std = 8 * 2.0 ** (math.floor(math.log2(abs(mean))) - (7 if dtype == torch.bfloat16 else 10))  # 8 steps wide
    assert cause(scores(mean=mean, std=std).to(dtype)) == str(dtype).removeprefix("torch.")
    assert cause(scores(mean=mean, std=std).float()) is None


def test_clipped_and_saturated_scores_share_the_highest_one():
    """OpenRLHF clips rewards to +-10 and verl applies a sigmoid unless told otherwise: the upper tail is gone."""
    raw = scores(mean=9.0, std=2.0)
    assert cause(raw) is None
    assert cause(raw.clamp(-10, 10)) == "ceiling"
    assert cause((2 * raw).float().sigmoid()) == "float32"  # 1 - 2**-24 and its neighbours
    assert cause(scores(mean=16.6, std=0.3).float().sigmoid()) == "float32"  # these two only


def test_rounded_decimals_are_a_grid():
    assert cause((scores() * 10).round() / 10) == "grid"


@pytest.mark.parametrize(
    "rewards",
    [
        (scores() > 0),  # right or wrong
        (scores(std=20.0)).round(),  # points
        200 + scores(std=10.0).round().clamp(-50, 50),  # lengths
        (scores() * 2).round().clamp(0, 4) / 4,  # a rubric
        scores(),
    ],
)
def test_scores_that_are_meant_to_be_equal_have_no_cause(rewards):
    assert cause(rewards) is None
