"""Means over prompts, paired differences, variance components and the crossed bootstrap."""

import time

import pytest
import torch
from scipy import stats

from tealightning.functional.statistics import (
    _drop_and_fill,
    crossed_components,
    crossed_interval,
    mean_over_prompts,
    paired_difference,
)

NAN = float("nan")


def test_mean_over_prompts_ignores_nan_prompts():
    estimate = mean_over_prompts(torch.tensor([[1.0, NAN], [2.0, 5.0], [6.0, NAN]]))
    assert estimate.mean.tolist() == [3.0, 5.0]
    assert estimate.num_prompts.tolist() == [3, 1]
    assert estimate.standard_error[0].item() == pytest.approx((7 / 3) ** 0.5)  # variance 7
    assert estimate.standard_error[1].isnan()


def test_mean_over_no_prompts_is_nan():
    estimate = mean_over_prompts(torch.zeros(0, 2))
    assert estimate.mean.isnan().all()
    assert estimate.num_prompts.tolist() == [0, 0]


def test_paired_difference_matches_prompts_by_key():
    before = (torch.tensor([7, 3, 5]), torch.tensor([[10.0], [1.0], [100.0]]))
    after = (torch.tensor([3, 9, 7]), torch.tensor([[2.0], [50.0], [13.0]]))
    difference, standard_error, num_prompts = paired_difference(before, after)
    assert difference.tolist() == [2.0]  # 3 on prompt 7 and 1 on prompt 3
    assert standard_error.item() == pytest.approx(1.0)
    assert num_prompts.tolist() == [2]


def test_paired_difference_leaves_out_prompts_that_either_run_could_not_measure():
    keys = torch.tensor([1, 2, 3])
    estimate = paired_difference((keys, torch.tensor([1.0, NAN, 3.0])), (keys, torch.tensor([2.0, 2.0, NAN])))
    assert estimate.mean.item() == 1.0
    assert estimate.num_prompts.item() == 1


def test_paired_difference_has_a_smaller_error_than_unpaired_means():
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.randn(200, generator=generator)
    keys = torch.arange(200)
    before = difficulty + 0.1 * torch.randn(200, generator=generator)
    after = difficulty + 0.1 * torch.randn(200, generator=generator)
    paired = paired_difference((keys, before), (keys, after)).standard_error
    assert paired < 0.2 * mean_over_prompts(before).standard_error


def test_paired_difference_refuses_repeated_keys_and_other_columns():
    keys = torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"before .* no key twice"):
        paired_difference((keys, torch.zeros(2)), (torch.tensor([1, 2]), torch.zeros(2)))
    with pytest.raises(ValueError, match="same columns"):
        paired_difference((torch.tensor([1]), torch.zeros(1, 2)), (torch.tensor([1]), torch.zeros(1, 3)))


COLUMNS = 100  # datasets that share resamples: few, so that the resamples' own error averages out
# Variances of seeds, prompts and residual. Shares of Var(mean) are these over S, Q and S*Q.
SETTINGS = {
    "seeds": lambda s, q: (1, 0, 0),
    "prompts": lambda s, q: (0, 1, 0),
    "residual": lambda s, q: (0, 0, 1),
    "equal shares": lambda s, q: (s, q, s * q),
    "seeds and residual": lambda s, q: (s, 0, s * q),
    "prompts and residual": lambda s, q: (0, q, s * q),
    "some seeds and prompts": lambda s, q: (0.3 * s, q, 0),
    "seeds and prompts": lambda s, q: (s, q, 0),
    "equal variances": lambda s, q: (1, 1, 1),
}


def centred(shape, kind, generator):
    draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    return draws if kind == "normal" else draws.exponential_(generator=generator) - 1


def coverage(seeds, prompts, variances, *, datasets, prompt_kind="normal", residual_kind="normal", samples=500):
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()
    hits = 0
    for chunk in range(datasets // COLUMNS):
        values = scale[0] * centred((seeds, 1, COLUMNS), "normal", generator)
        values = values + scale[1] * centred((1, prompts, COLUMNS), prompt_kind, generator)
        values = values + scale[2] * centred((seeds, prompts, COLUMNS), residual_kind, generator)
        interval = crossed_interval(values, samples=samples, seed=chunk)
        hits += int(((interval.low <= 0) & (interval.high >= 0)).sum())
    return hits / datasets


@pytest.mark.parametrize(
    ("seeds", "prompts", "setting", "prompt_kind"),
    [
        (5, 48, "equal shares", "normal"),
        (5, 48, "residual", "normal"),
        (5, 48, "prompts", "exponential"),
        (3, 24, "equal variances", "normal"),
        (3, 24, "seeds", "normal"),
    ],
)
def test_crossed_interval_covers_the_mean_of_clustered_data(seeds, prompts, setting, prompt_kind):
    variances = SETTINGS[setting](seeds, prompts)
    assert 0.93 <= coverage(seeds, prompts, variances, datasets=2000, prompt_kind=prompt_kind) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "prompts"), [(3, 24), (3, 96), (5, 48), (10, 24), (10, 96)])
@pytest.mark.parametrize("kinds", [("normal", "normal"), ("exponential", "normal"), ("exponential", "exponential")])
def test_crossed_interval_covers_the_mean_whichever_variance_dominates(seeds, prompts, kinds):
    measured = {
        name: coverage(
            seeds, prompts, rule(seeds, prompts), datasets=5000, prompt_kind=kinds[0], residual_kind=kinds[1]
        )
        for name, rule in SETTINGS.items()
    }
    print(seeds, prompts, kinds, measured)
    assert all(0.93 <= share <= 0.97 for share in measured.values()), measured


def test_crossed_interval_of_one_prompt_is_a_t_interval_over_seeds():
    values = torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    interval = crossed_interval(values)
    error = 7**0.5 / 3**0.5
    half = stats.t.ppf(0.975, 2) * error
    expected = [3.0, 3.0 - half, 3.0 + half, error, stats.ttest_1samp([1.0, 2.0, 6.0], 0).pvalue]
    measured = [interval.mean, interval.low, interval.high, interval.standard_error, interval.p_value]
    torch.testing.assert_close(torch.cat(measured), torch.tensor(expected, dtype=torch.float64))


def test_crossed_interval_of_seed_effects_is_a_t_interval_over_seeds():
    values = torch.tensor([1.0, 2.0, 6.0])[:, None, None].expand(3, 48, 1)
    interval = crossed_interval(values)
    half = stats.t.ppf(0.975, 2) * 7**0.5 / 3**0.5
    torch.testing.assert_close(
        interval.high - interval.mean, torch.tensor([half], dtype=torch.float64), rtol=2e-3, atol=0
    )


def test_crossed_interval_of_one_seed_is_over_prompts():
    values = torch.randn(1, 48, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = crossed_interval(values)
    error = float(values.std() / 48**0.5)
    assert interval.standard_error.item() == pytest.approx(error)
    assert (interval.high - interval.low).item() == pytest.approx(2 * stats.t.ppf(0.975, 47) * error, rel=0.1)


def test_crossed_interval_reaches_farther_towards_the_long_tail_of_prompts():
    steps = (torch.arange(48, dtype=torch.float64) + 0.5) / 48
    values = -(1 - steps).log()[None, :, None].expand(5, 48, 1)  # quantiles of the exponential distribution
    interval = crossed_interval(values)
    above, below = interval.high - interval.mean, interval.mean - interval.low
    assert 1.2 < (above / below).item() < 2.5
    flipped = crossed_interval(-values)
    torch.testing.assert_close(flipped.low, -interval.high, rtol=0.05, atol=0)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_crossed_interval_p_value_is_small_exactly_where_zero_is_outside(confidence):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 24, 300, generator=generator, dtype=torch.float64) + 0.15
    values += centred((1, 24, 300), "exponential", generator) * 0.3
    interval = crossed_interval(values, confidence=confidence)
    outside = (interval.low > 0) | (interval.high < 0)
    assert 30 < int(outside.sum()) < 270
    assert torch.equal(interval.p_value < 1 - confidence, outside)


def test_crossed_interval_of_constants_has_no_width():
    values = torch.tensor([0.0, 0.1, -3.0], dtype=torch.float64).expand(3, 24, 3)
    interval = crossed_interval(values)
    assert interval.mean.tolist() == interval.low.tolist() == interval.high.tolist() == [0.0, 0.1, -3.0]
    assert interval.standard_error.tolist() == [0.0, 0.0, 0.0]
    assert interval.p_value.tolist() == [1.0, 0.0, 0.0]


def test_crossed_interval_stays_finite_where_one_prompt_differs():
    values = torch.ones(5, 24, 1, dtype=torch.float64)
    values[:, 0] = 0.0
    interval = crossed_interval(values)
    assert 0.75 < interval.low.item() < 0.92 and 0.97 < interval.high.item() < 1.1


def test_crossed_interval_of_one_cell_is_nan_but_for_the_mean():
    interval = crossed_interval(torch.tensor([[[2.0]]]))
    assert interval.mean.item() == 2.0
    rest = torch.cat([interval.low, interval.high, interval.standard_error, interval.p_value])
    assert rest.isnan().all()


def test_crossed_interval_leaves_out_missing_prompts_and_seeds():
    values = torch.randn(4, 20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    holes = values.clone()
    holes[1], holes[:, 7] = NAN, NAN
    kept = values[[0, 2, 3]][:, [q for q in range(20) if q != 7]]
    torch.testing.assert_close(crossed_interval(holes).low, crossed_interval(kept).low)
    assert crossed_interval(torch.full((3, 5, 1), NAN)).mean.isnan().all()


def test_crossed_interval_columns_do_not_depend_on_each_other():
    values = torch.randn(5, 24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, 3, 2] = NAN
    together = crossed_interval(values, seed=3)
    for column in range(6):
        alone = crossed_interval(values[:, :, column : column + 1], seed=3)
        torch.testing.assert_close(alone.low[0], together.low[column], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.p_value[0], together.p_value[column], rtol=1e-9, atol=1e-12)
    assert torch.equal(crossed_interval(values, seed=3).low, together.low)
    assert not torch.equal(crossed_interval(values, seed=4).low, together.low)


def test_crossed_interval_is_fast():
    values = torch.randn(5, 48, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        crossed_interval(values)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(3, 4), {}, "values: expected"),
        (torch.zeros(3, 4, 1), {"confidence": 95}, "confidence: expected"),
        (torch.zeros(3, 4, 1), {"samples": 1}, "samples: expected"),
    ],
)
def test_crossed_interval_says_which_argument_is_wrong(values, options, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(values, **options)


def test_crossed_components_of_a_small_table():
    # Seed effects -1, 1; prompt effects -2, 0, 2; residual 1, -2, 1 and its opposite: mean squares 6, 8, 6.
    table = torch.tensor([[10.0 - 1 - 2 + 1, 10 - 1 - 2, 10 - 1 + 2 + 1], [10 + 1 - 2 - 1, 10 + 1 + 2, 10 + 1 + 2 - 1]])
    parts = crossed_components(table.double()[:, :, None])
    assert parts.mean.item() == pytest.approx(10.0)
    assert parts.seed_variance.item() == pytest.approx(6 / 6)
    assert parts.prompt_variance.item() == pytest.approx((8 - 6) / 6)
    assert parts.degrees_of_freedom.item() == pytest.approx((8 / 6) / (1 / 1 + (2 / 6) / 2))
    assert parts.prompt_effects[:, 0].tolist() == pytest.approx([-2.0, 0.0, 2.0])


def test_drop_and_fill_reads_a_missing_cell_off_the_additive_table():
    filled, missing = _drop_and_fill(torch.tensor([[1.0, 2.0, 4.0], [11.0, 12.0, NAN], [NAN, NAN, NAN]]))
    assert missing == 1
    torch.testing.assert_close(filled, torch.tensor([[1.0, 2.0, 4.0], [11.0, 12.0, 14.0]]))
