"""Verdicts on rewards of known tails, and the report of `diagnose tail`."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tealightning.diagnostics.pool import RolloutPool
from tealightning.diagnostics.tail import (
    check_rows,
    diagnose_pool,
    judge_tail,
    prediction_rows,
    prompt_rows,
    two_sided,
    verdict_text,
    write_diagnosis,
)
from tealightning.estimators import build_estimator
from tealightning.functional.tail_checks import check_tail

NAN = float("nan")
PROVENANCE = {"command": "tealightning diagnose tail", "commit": "abc", "seed": "0", "versions": "none"}


def draw(kind, seed, prompts=64, samples=128, location_and_scale=True):
    """Rewards of prompts that differ in location and scale."""
    rng = np.random.default_rng(seed)
    location, scale = rng.normal(0, 3, (prompts, 1)), np.exp(rng.normal(0, 1, (prompts, 1)))
    size = (prompts, samples)
    values = {
        "gaussian": lambda: rng.standard_normal(size),
        "student_t3": lambda: rng.standard_t(3, size),
        "student_t5": lambda: rng.standard_t(5, size),
        "gpd_0.2": lambda: (rng.random(size) ** -0.2 - 1) / 0.2,
        "gpd_0.3": lambda: (rng.random(size) ** -0.3 - 1) / 0.3,
        "uniform": lambda: rng.random(size),
        "beta_2_2": lambda: rng.beta(2, 2, size),
        "sigmoid": lambda: 1 / (1 + np.exp(-2 * rng.standard_normal(size))),
        "quarters": lambda: np.round(4 * rng.standard_normal(size)) / 4,
        "grades": lambda: np.clip(np.round(3 + rng.standard_normal(size)), 1, 5),
        "verifier": lambda: parts(rng, size, (0.75, 0.0, 0.0), (0.99, 0.0, 0.4), (1.0, 0.7, 1.0)),
        "verifier_with_noise": lambda: (rng.random(size) < 0.3) + 0.01 * rng.standard_normal(size),
        "two_ranges": lambda: parts(rng, size, (0.7, 0.0, 0.1), (1.0, 0.7, 1.0)),
        "clipped": lambda: np.minimum(rng.standard_normal(size), 0.8),
        "binary": lambda: (rng.random(size) < 0.3) * 1.0,
    }[kind]()
    return torch.from_numpy(values * scale + location if location_and_scale else values)


def parts(rng, size, *ranges):
    """Uniform in one of the ranges (cumulative probability, low, high)."""
    chosen, within = rng.random(size), rng.random(size)
    values = np.zeros(size)
    for probability, low, high in reversed(ranges):
        values = np.where(chosen < probability, low + (high - low) * within, values)
    return values


def pool_of(rewards):
    return RolloutPool(ids=[f"p{i}" for i in range(len(rewards))], rewards=rewards)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gaussian", "gaussian"),
        ("student_t3", "heavier"),
        ("student_t5", "heavier"),
        ("gpd_0.2", "heavier"),
        ("gpd_0.3", "heavier"),
        ("uniform", "bounded"),
        ("beta_2_2", "bounded"),
        ("sigmoid", "bounded"),
    ],
)
@pytest.mark.parametrize("prompts", [64, 100])
def test_verdict_on_continuous_rewards(kind, expected, prompts):
    verdicts = Counter(judge_tail(check_tail(draw(kind, seed, prompts))).name for seed in range(10))
    assert verdicts[expected] >= (9 if kind == "gaussian" else 10)  # by design 1% of Gaussian rewards are misjudged


@pytest.mark.parametrize(("kind", "expected"), [("quarters", "discrete"), ("grades", "discrete"), ("binary", "binary")])
def test_verdict_on_few_values(kind, expected):
    found = [judge_tail(check_tail(draw(kind, seed, location_and_scale=False))).name for seed in range(5)]
    assert found == [expected] * 5


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("verifier", "discrete", r"^(49|5\d)% of the upper 0\.5 of a prompt's rewards have one and the same value"),
        ("verifier_with_noise", "two_pointed", r"^Two clusters explain 100% of the variance of the upper 0\.5 "),
        ("two_ranges", "two_pointed", r"^Two clusters explain 9\d% of the variance of the upper 0\.5 "),
        ("clipped", "discrete", r"^\d\d% of the upper "),
    ],
)
@pytest.mark.parametrize("samples", [64, 128, 512])
def test_nearly_discrete_rewards_are_told_to_be_far_from_a_gaussian_tail(kind, expected, message, samples):
    verdict = judge_tail(check_tail(draw(kind, 0, samples=samples, location_and_scale=False)))
    assert verdict.name == expected
    assert re.search(message, verdict.reason), verdict.reason
    assert "far from a Gaussian tail" in verdict.reason
    assert verdict.settings == {"tail": "empirical"}


def test_the_part_that_is_tested_is_twice_alpha_unless_set():
    """The upper half is Gaussian, the lower half one value: whoever looks at all of it sees the lump."""
    rewards = draw("gaussian", 0)
    tops = rewards.topk(64, dim=1).values
    rewards = torch.cat([tops, tops.amin(dim=1, keepdim=True).expand(-1, 64) - 50], dim=1)
    for share, size in ((None, 64), (0.5, 64), (0.25, 32), (1.0, 128)):
        checks = check_tail(rewards, tested_share=share)
        assert checks.tested.shape == (64, size) and checks.tail.shape == (64, 32)
        assert judge_tail(checks).reason.startswith("50% of all of a prompt's rewards") == (share == 1)
        assert (float(checks.atoms.mean()), checks.tested_share) == ((0.5, 1.0) if share == 1 else (0.0, share or 0.5))
    assert check_tail(rewards, alpha=0.7).tested_share == 1.0


@pytest.mark.slow
def test_gaussian_rewards_are_called_something_else_in_about_a_percent_of_cases():
    verdicts = Counter(judge_tail(check_tail(draw("gaussian", 1000 + seed, 80))).name for seed in range(300))
    assert verdicts["gaussian"] >= 300 - 9  # 3 expected: more than 9 in 1 of 1000 trials


def test_values_rounded_finer_than_the_tail_are_not_discrete():
    rewards = draw("gaussian", 0, location_and_scale=False).mul(10).round() / 10
    assert float(check_tail(rewards).ties.mean()) > 0.7
    assert judge_tail(check_tail(rewards)).name == "gaussian"


@pytest.mark.parametrize("kind", ["gaussian", "student_t3", "uniform", "quarters", "binary", "verifier", "two_ranges"])
def test_the_recommended_estimator_can_be_built(kind):
    verdict = judge_tail(check_tail(draw(kind, 0, location_and_scale=False)))
    build_estimator(verdict.estimator, target_n=128, **verdict.settings).check_group_size(16)


def test_the_threshold_of_other_binary_rewards_lies_between_them():
    verdict = judge_tail(check_tail(10 + 4 * draw("binary", 0, location_and_scale=False)))
    assert (verdict.name, verdict.settings) == ("binary", {"threshold": 12.0})


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        (torch.full((20, 64), 0.1), "No prompt has two different rewards"),
        (torch.full((20, 64), NAN), "No prompt has two different rewards"),
        (draw("gaussian", 0, samples=6), "The upper 0.5 of a prompt's rewards are 3 samples, and 4 are needed"),
        (draw("gaussian", 0, prompts=9), "9 prompts have different rewards, and 10 are needed"),
        (draw("gaussian", 1, prompts=12, samples=24), r"too uncertain to tell: about \d+ prompts"),
    ],
)
def test_too_little_is_undecided_and_says_what_is_missing(rewards, reason):
    verdict = judge_tail(check_tail(rewards))
    assert verdict.name == "undecided"
    assert re.search(reason, verdict.reason), verdict.reason


def test_too_many_bent_lines_are_undecided_although_the_shape_is_right():
    checks = check_tail(draw("gaussian", 0))
    levels = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)
    assert judge_tail(replace(checks, qq_p=levels)).name == "gaussian"
    levels[:16] = 0.0
    verdict = judge_tail(replace(checks, qq_p=levels))
    assert verdict.name == "undecided" and "25% of the prompts have a tail that is not straight" in verdict.reason


def test_predictions_decide_where_the_shape_does_not():
    checks = check_tail(draw("gaussian", 0))
    for shift, name in ((-0.5, "heavier"), (-0.2, "heavier"), (0.15, "bounded"), (0.5, "bounded"), (0.0, "gaussian")):
        held_out = checks.held_out._replace(error=checks.held_out.error + shift)
        verdict = judge_tail(replace(checks, held_out=held_out))
        assert verdict.name == name
        assert verdict.estimator == ("tea" if name == "heavier" else "optimal_tea")
        assert ("best-of-112 differs" in verdict.reason) == (name != "gaussian")


@pytest.mark.parametrize(("tail", "estimator", "settings"), [(15, "optimal_tea", {}), (16, "tea", {"tail": "gpd"})])
def test_a_shape_is_fitted_only_where_groups_have_a_long_bounded_tail(tail, estimator, settings):
    verdict = judge_tail(check_tail(draw("uniform", 0)), training_tail=tail)
    assert (verdict.estimator, verdict.settings) == (estimator, settings)
    assert judge_tail(check_tail(draw("student_t3", 0)), training_tail=tail).settings == {}


def test_p_values_of_a_mean_over_prompts():
    assert two_sided(2.2621571628, 1.0, 10) == pytest.approx(0.05)  # Student's t with 9 degrees of freedom
    assert two_sided(0.0, 0.0, 5) == 1.0 and two_sided(0.1, 0.0, 5) == 0.0 and two_sided(5.0, NAN, 1) == 1.0


# ---------------------------------------------------------------- the report


def test_report_files_hold_the_numbers(tmp_path):
    diagnosis = diagnose_pool(pool_of(draw("student_t5", 0)))
    files = write_diagnosis(tmp_path / "new", diagnosis, PROVENANCE)
    assert [file.name for file in files] == ["tail.md", "tail.csv", "tail.json", "qq.png", "prediction.png"]
    page = files[0].read_text()
    assert (
        page.index("Verdict: **heavier**") < page.index("| check |") < page.index("| n |") < page.index("commit: abc")
    )
    record = json.loads(files[2].read_text())
    assert record["verdict"]["name"] == "heavier" and record["prompts"] == 64 and record["samples"] == 128
    assert record["summary"]["tail_shape"] == float(diagnosis.checks.shape.shape)
    assert record["predictions"] == prediction_rows(diagnosis)
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == diagnosis.ids
    assert record["tested_share"] == 0.5 and float(rows[3]["two_clusters"]) == float(diagnosis.checks.two_clusters[3])
    assert (
        "| shape of the upper 0.5 |" in page and "| variance of the upper 0.5 between two clusters (median) |" in page
    )
    assert float(rows[3]["qq_r2"]) == float(diagnosis.checks.qq_r2[3])
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files[3:])


def test_prediction_rows_are_means_over_prompts():
    diagnosis = diagnose_pool(pool_of(draw("gaussian", 0)), m=32, ns=[8, 96])
    rows = prediction_rows(diagnosis)
    assert [row["n"] for row in rows] == [8, 96]
    assert rows[1]["error"] == pytest.approx(rows[1]["predicted"] - rows[1]["measured"])
    assert rows[1]["error"] == pytest.approx(float(diagnosis.checks.held_out.error[:, 1].mean()))
    assert rows[1]["measured"] == pytest.approx(2.4885, abs=0.1)  # c_96: best of 96 standard normals
    assert next(row for row in check_rows(diagnosis) if "best-of-96 from 32" in row["check"])


@pytest.mark.parametrize("rewards", [draw("gaussian", 0, prompts=3, samples=6), torch.full((2, 40), NAN)])
def test_a_report_on_too_little_is_written_all_the_same(tmp_path, rewards):
    diagnosis = diagnose_pool(pool_of(rewards))
    files = write_diagnosis(tmp_path, diagnosis, PROVENANCE)
    assert [file.name for file in files] == ["tail.md", "tail.csv", "tail.json"]
    assert json.loads(files[2].read_text())["verdict"]["name"] == "undecided"
    assert "Verdict: **undecided**" in verdict_text(diagnosis)


def test_prompts_with_too_few_samples_are_left_out_and_counted():
    rewards = draw("gaussian", 0, prompts=12, samples=40)
    rewards[2, 10:] = NAN
    diagnosis = diagnose_pool(pool_of(rewards))
    message = "11 of 12 prompts with 40 samples each. Tested: the upper 0.5 of each prompt's rewards, 20 samples; an "
    assert message in verdict_text(diagnosis)
    assert [row["id"] for row in prompt_rows(diagnosis)] == [f"p{i}" for i in range(12) if i != 2]
