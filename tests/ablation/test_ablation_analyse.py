import json
import re
from pathlib import Path

import numpy as np
import pytest

from tealightning.ablation.analyse import analyse
from tealightning.ablation.plan import make_plan
from tealightning.ablation.runner import Outcome
from tealightning.ablation.spec import parse_spec
from tealightning.ablation.tables import BUDGETS
from tealightning.callbacks.evaluation_record import save_arrays

PAGE = Path(__file__).parents[2] / "docs" / "ablations-results.md"
SEEDS = (3, 5)
# Two prompts, four samples: means 1.5 and 5, maxima 3 and 8.
START = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 4.0, 4.0, 8.0]])
# Means 11.5 and 20, maxima 13 and 20. All above all of START.
BETTER = np.array([[10.0, 11.0, 12.0, 13.0], [20.0, 20.0, 20.0, 20.0]])


def plan_of(folder, *, variants=("grpo", "tea"), evaluation=None):
    spec = {
        "name": "trial",
        "out": str(folder),
        "base": ["base.yaml"],
        "variants": {name: {"model.estimator": name} for name in variants},
        "reference": "grpo",
        "seeds": list(SEEDS),
        "equal": {"optimizer_steps": 10},
        "labels": {"tea": "TEA"},
        "bootstrap_samples": 100,
        "evaluation": {"ns": [1, 4]} | (evaluation or {}),
    }

    def resolve(args):
        return {
            "seed_everything": 0,
            "model": {"init_args": {"policy": "policy", "estimator": {"given": list(args)}}},
            "data": {"init_args": {"batch_size": 4}},
            "rollout": {"group_size": 8},
            "trainer": {},
        }

    return make_plan(parse_spec(spec), resolve)


def write(job, rewards, *, step=10, split="val", keys=(11, 22), **columns):
    rewards = np.array(rewards)
    arrays = {"keys": np.array(keys), "rewards": rewards}
    arrays["lengths"] = np.full(rewards.shape, 5)
    arrays["truncated"] = np.zeros(rewards.shape, dtype=bool)
    columns = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    save_arrays(job.folder / "evaluations" / f"{split}_{step:06d}.npz", arrays | columns)


def outcomes_of(plan):
    """All finished; the budgets of seed s are s times 1, 2, 3, 4 and 5."""
    return {
        job.folder: Outcome(
            status="finished", record={"commit": "abc"} | {name: job.seed * (i + 1) for i, name in enumerate(BUDGETS)}
        )
        for job in plan.all_jobs
    }


def write_all(plan, rewards):
    """`rewards`: (variant, seed) -> of the trained policy; the starting policy has START."""
    for seed in SEEDS:
        write(plan.starts["grpo", seed], START, step=0)
    for key, values in rewards.items():
        write(plan.jobs[key], values)


def usual():
    """grpo has learnt nothing, tea a lot, with its second seed 2 better than with its first."""
    return {("grpo", 3): START, ("grpo", 5): START, ("tea", 3): BETTER, ("tea", 5): BETTER + 2}


def analysed(plan, outcomes=None):
    results = analyse(plan, outcomes or outcomes_of(plan), {"command": "none"})
    json.dumps(results, allow_nan=False)
    return results


def column(rows, name="mean"):
    return [row[name] for row in rows]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    plan = plan_of(tmp_path_factory.mktemp("trial"))
    write_all(plan, usual())
    return analysed(plan)


def test_best_of_n_is_the_mean_of_means_and_of_maxima(results):
    split = results["splits"]["val"]
    assert (split["num_prompts"], split["samples_per_prompt"]) == (2, 4)
    assert column(split["start"]["best_of_n"], "n") == [1, 4]
    assert column(split["start"]["best_of_n"]) == [3.25, 5.5]
    assert column(split["variants"]["grpo"]["best_of_n"]) == [3.25, 5.5]
    assert column(split["variants"]["tea"]["best_of_n"]) == [16.75, 17.5]  # seeds: 15.75 and 17.75; 16.5 and 18.5
    for row in split["variants"]["tea"]["best_of_n"]:
        assert row["low"] < row["mean"] < row["high"] and row["se"] > 0


def test_difference_is_that_of_the_means(results):
    variants = results["splits"]["val"]["variants"]
    assert variants["grpo"]["against_reference"] is variants["grpo"]["reference"] is None
    assert variants["tea"]["reference"] == "grpo"
    assert column(variants["tea"]["against_reference"]) == [13.5, 12.0]
    assert column(variants["tea"]["against_start"]) == [13.5, 12.0]
    assert column(variants["grpo"]["against_start"]) == [0.0, 0.0]


def test_probabilities_are_1_for_always_better_and_a_half_for_the_same(results):
    variants = results["splits"]["val"]["variants"]
    for row in variants["tea"]["against_reference"]:
        assert row["probability_of_improvement"]["mean"] == row["win_rate"]["mean"] == 1.0
        assert row["win_rate"]["high"] == 1.0
    for row in variants["grpo"]["against_start"]:
        assert row["probability_of_improvement"]["mean"] == row["win_rate"]["mean"] == 0.5
        assert row["p_value"] == 1.0


def test_win_rate_compares_samples_and_improvement_expectations(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual() | {("tea", seed): START + 0.5 for seed in SEEDS})
    one, four = analysed(plan)["splits"]["val"]["variants"]["tea"]["against_reference"]
    assert one["probability_of_improvement"]["mean"] == four["probability_of_improvement"]["mean"] == 1.0
    assert one["win_rate"]["mean"] == (10 / 16 + 13 / 16) / 2  # pairs of samples of each prompt that tea wins
    assert four["win_rate"]["mean"] == 1.0


def test_p_values_are_corrected_over_variants_at_the_headline_n_only(results):
    assert results["headline_n"] == 4
    variants = results["splits"]["val"]["variants"]
    one, four = variants["tea"]["against_start"]
    assert 0 < four["p_value"] < 0.5
    assert four["p_adjusted"] == pytest.approx(2 * four["p_value"])  # the smaller of two
    assert variants["grpo"]["against_start"][1]["p_adjusted"] == 1.0
    assert one["p_adjusted"] is None and one["p_value"] is not None
    (_, four) = variants["tea"]["against_reference"]
    assert four["p_adjusted"] == four["p_value"]  # the only one


def test_diagnostics_are_means_over_seeds_and_prompts(results):
    found = results["splits"]["val"]["start"]["diagnostics"]
    assert found["completion_length"]["mean"] == 5.0
    assert found["truncated_fraction"]["mean"] == found["unscorable_fraction"]["mean"] == 0.0
    assert found["reward_std"]["mean"] == pytest.approx(((5 / 3) ** 0.5 + 2.0) / 2)
    assert found["kl"] is None


def test_what_was_not_measured_is_absent(results):
    assert set(results["splits"]) == {"val"}
    assert results["equal_kl"] is None
    assert results["training"] == {"grpo": {}, "tea": {}}
    assert results["splits"]["val"]["start"]["gold_best_of_n"] is None
    assert results["checkpoints"]["tea"][0]["kl"] is results["checkpoints"]["tea"][0]["gold_best_of_n"] is None


def test_budgets_labels_and_histograms(results):
    assert results["budgets"]["tea"] == dict(zip(BUDGETS, [4.0, 8.0, 12.0, 16.0, 20.0], strict=True))
    assert results["labels"] == {"grpo": "grpo", "tea": "TEA"}
    assert results["equal"] == {"what": "optimizer_steps", "amount": 10}
    edges = results["histograms"]["edges"]
    assert (edges[0], edges[-1]) == (0.0, 22.0)
    for density in (results["histograms"]["start"], *results["histograms"]["variants"].values()):
        assert sum(density) * (edges[1] - edges[0]) == pytest.approx(1.0)


def documented(start, end):
    """Keys in the first column of the tables between two texts of the page."""
    part = PAGE.read_text(encoding="utf-8").split(start, 1)[1].split(end, 1)[0]
    cells = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


def test_keys_are_those_of_the_page(results):
    assert set(results) == documented("A *curve* is", "### Runs and budgets")
    assert set(results["runs"][0]) == documented("### Runs and budgets", "### Splits")
    row = results["splits"]["val"]["variants"]["tea"]
    assert set(row) == documented("A policy after training has", "A list of differences")


def test_a_failed_run_is_listed_and_left_out(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual() | {("grpo", 5): START + 1})
    outcomes = outcomes_of(plan)
    outcomes[plan.jobs["tea", 5].folder] = Outcome(status="failed", error="ValueError: no")
    results = analysed(plan, outcomes)
    tea = results["splits"]["val"]["variants"]["tea"]
    assert tea["seeds"] == [3]
    assert column(tea["best_of_n"]) == [15.75, 16.5]
    assert column(tea["against_reference"]) == [12.5, 11.0]  # to grpo with seed 3 alone
    assert results["splits"]["val"]["variants"]["grpo"]["seeds"] == [3, 5]
    assert results["budgets"]["tea"]["optimizer_steps"] == 3
    rows = {(row["variant"], row["seed"]): row for row in results["runs"]}
    assert len(results["runs"]) == 6  # two starting policies too
    failed = rows["tea", 5]
    assert (failed["status"], failed["error"], failed["rollouts"]) == ("failed", "ValueError: no", None)
    assert rows["start", 3]["status"] == "finished" and rows["tea", 3]["commit"] == "abc"


def test_a_run_whose_starting_policy_was_not_evaluated_is_left_out(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    outcomes = outcomes_of(plan) | {plan.starts["grpo", 3].folder: Outcome(status="failed", error="no")}
    variants = analysed(plan, outcomes)["splits"]["val"]["variants"]
    assert [row["seeds"] for row in variants.values()] == [[5], [5]]


def test_without_the_reference_there_is_nothing_to_compare_with(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    outcomes = outcomes_of(plan)
    outcomes |= {plan.jobs["grpo", seed].folder: Outcome(status="missing") for seed in SEEDS}
    results = analysed(plan, outcomes)
    assert results["variants"] == ["tea"]
    assert results["splits"]["val"]["variants"]["tea"]["against_reference"] is None


def test_without_a_finished_run_there_is_no_result(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    with pytest.raises(ValueError, match="no run has finished"):
        analyse(plan, {job.folder: Outcome(status="missing") for job in plan.all_jobs}, {})


def test_prompts_are_paired_by_key_and_those_that_not_all_have_are_left_out(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    write(plan.jobs["tea", 3], [[1000.0] * 4, *BETTER[::-1]], keys=(5, 22, 11))
    split = analysed(plan)["splits"]["val"]
    assert split["num_prompts"] == 2
    one, four = split["variants"]["tea"]["against_reference"]
    assert (one["mean"], four["mean"]) == (13.5, 12.0)
    assert one["p_value"] < 1 and four["win_rate"]["mean"] == 1.0


def test_unscored_samples_are_no_samples(tmp_path):
    plan = plan_of(tmp_path)
    unscored = START.copy()
    unscored[0, 0] = np.nan
    write_all(plan, usual() | {("tea", seed): unscored for seed in SEEDS})
    tea = analysed(plan)["splits"]["val"]["variants"]["tea"]
    assert column(tea["best_of_n"]) == [3.5, 8.0]  # means 2 and 5; the first prompt has no four samples
    assert tea["diagnostics"]["unscorable_fraction"]["mean"] == 1 / 8


def test_a_single_cell_has_no_interval(tmp_path):
    plan = plan_of(tmp_path)
    for seed in SEEDS:
        write(plan.starts["grpo", seed], START[:1], keys=[11], step=0)
    write(plan.jobs["tea", 3], BETTER[:1], keys=[11])
    outcomes = outcomes_of(plan)
    outcomes |= {plan.jobs["grpo", seed].folder: Outcome(status="missing") for seed in SEEDS}
    outcomes[plan.jobs["tea", 5].folder] = Outcome(status="missing")
    (row, _) = analysed(plan, outcomes)["splits"]["val"]["variants"]["tea"]["best_of_n"]
    assert row == {"n": 1, "mean": 11.5, "low": None, "high": None, "se": None}


def test_held_out_prompts_are_a_split_of_their_own(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    for job in plan.all_jobs:
        write(job, np.full((1, 4), float(job.seed)), split="test", keys=[99])
    splits = analysed(plan)["splits"]
    assert (splits["val"]["num_prompts"], splits["test"]["num_prompts"]) == (2, 1)
    assert column(splits["test"]["variants"]["tea"]["best_of_n"]) == [4.0, 4.0]
    assert column(splits["val"]["variants"]["tea"]["best_of_n"]) == [16.75, 17.5]


def test_gold_is_that_of_the_sample_which_the_reward_picks(tmp_path):
    plan = plan_of(tmp_path)
    for seed in SEEDS:
        write(plan.starts["grpo", seed], START, step=0, gold=10 * START)
        for name in ("grpo", "tea"):
            write(plan.jobs[name, seed], START, gold=-START)
    results = analysed(plan)
    split = results["splits"]["val"]
    assert column(split["start"]["gold_best_of_n"]) == [32.5, 55.0]
    assert column(split["variants"]["tea"]["gold_best_of_n"]) == [-3.25, -5.5]  # not the best gold, which is -2
    assert [column(row["gold_best_of_n"]) for row in results["checkpoints"]["tea"]] == [[32.5, 55.0], [-3.25, -5.5]]


def write_curve(job, *points):
    """Evaluations with START plus `gain` at the KL `kl`, which differs between the two prompts."""
    for i, (gain, kl) in enumerate(points):
        write(job, START + gain, step=5 * (i + 1), kl=[kl / 2, 3 * kl / 2])


@pytest.fixture
def curves(tmp_path):
    """Plan and results with a KL: tea's seeds both get to 4, grpo's to 4 and 1."""

    def with_kls(kls):
        plan = plan_of(tmp_path, evaluation={"equal_kls": kls})
        for seed in SEEDS:
            write(plan.starts["grpo", seed], START, step=0, kl=[0.0, 0.0])
            write_curve(plan.jobs["tea", seed], (2, 1), (6, 4))
        write_curve(plan.jobs["grpo", 3], (2, 1), (6, 4))
        write_curve(plan.jobs["grpo", 5], (4, 1), (100, 0.5))  # falls back: the second point counts for nothing
        return analysed(plan)

    return with_kls


def test_equal_kl_is_interpolated_in_the_root_of_the_kl(curves):
    found = curves([0.25, 1, 2.25, 4, 9])["equal_kl"]
    assert found["kls"] == [0.25, 1, 2.25, 4, 9]
    *reached, beyond = found["variants"]["tea"]
    assert [row["kl"] for row in reached] == [0.25, 1, 2.25, 4]
    # Roots 0.5, 1, 1.5 and 2 of a curve with the gains 0, 2 and 6 at the roots 0, 1 and 2.
    assert [row["best_of_n"][0]["mean"] - 3.25 for row in reached] == pytest.approx([1, 2, 4, 6])
    assert [row["best_of_n"][1]["mean"] - 5.5 for row in reached] == pytest.approx([1, 2, 4, 6])
    assert beyond is None


def test_equal_kl_differences_are_paired_by_seed(curves):
    found = curves([0.25, 1, 2.25])["equal_kl"]["variants"]
    assert [row["against_reference"] for row in found["grpo"][:2]] == [None, None]
    first, second, third = (row["against_reference"] for row in found["tea"])
    assert first[0]["mean"] == pytest.approx((0 + (1 - 2)) / 2)  # seed 3 is equal; seed 5 has gained 1 against 2
    assert second[1]["mean"] == pytest.approx((0 + (2 - 4)) / 2)
    assert 0 < second[0]["p_value"] < 1 and second[0]["low"] < -1 < second[0]["high"]
    assert third is None  # a seed of grpo ends at 1


def test_equal_kl_is_null_where_a_seed_never_got_so_far(curves):
    first, second, *beyond = curves([0.25, 1, 2.25, 4])["equal_kl"]["variants"]["grpo"]
    assert first["best_of_n"][0]["mean"] == pytest.approx(3.25 + (1 + 2) / 2)
    assert second["best_of_n"][0]["mean"] == pytest.approx(3.25 + (2 + 4) / 2)
    assert beyond == [None, None]


def test_equal_kls_are_chosen_up_to_the_median_reach(curves):
    assert curves(None)["equal_kl"]["kls"] == [0.5, 1.0, 1.5, 2.0, 2.5]  # tea reaches 4, grpo 1


def test_checkpoints_begin_with_the_starting_policy(curves):
    rows = curves(None)["checkpoints"]["tea"]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert [row["kl"]["mean"] for row in rows] == [0.0, 1.0, 4.0]
    assert [row["best_of_n"][1]["mean"] for row in rows] == [5.5, 7.5, 11.5]


def test_the_last_evaluation_is_the_trained_policy(curves):
    tea = curves(None)["splits"]["val"]["variants"]["tea"]
    assert column(tea["best_of_n"]) == [9.25, 11.5]
    assert tea["diagnostics"]["kl"]["mean"] == 4.0


@pytest.mark.parametrize("kls", [None, [0.001]])
def test_equal_kl_of_policies_that_did_not_move(tmp_path, kls):
    """Rounding makes the KL of the starting policy slightly larger than 0."""
    plan = plan_of(tmp_path, evaluation={"equal_kls": kls})
    for job in plan.all_jobs:
        write(job, START, step=10 * (job.kind == "fit"), kl=[1e-12, 1e-12])
    found = analysed(plan)["equal_kl"]
    rows = [row for variant in found["variants"].values() for row in variant] if found else []
    assert all(row is None or row["best_of_n"][0]["mean"] == 3.25 for row in rows)


def test_training_curves_are_means_over_seeds(tmp_path):
    plan = plan_of(tmp_path)
    write_all(plan, usual())
    header = "rollout/step,rollout/reward_mean,train/kl\n"
    (plan.jobs["tea", 3].folder / "metrics.csv").write_text(header + "1,10,0.5\n2,20,0.5\n3,30,0.5\n")
    (plan.jobs["tea", 5].folder / "metrics.csv").write_text(header + "1,14,\n2,20,\n")
    training = analysed(plan)["training"]
    assert training["grpo"] == {}
    found = training["tea"]
    assert set(found) == {"step", "reward_mean"}  # a seed has no KL
    assert found["step"] == [1, 2]
    assert found["reward_mean"]["mean"] == [12.0, 20.0]
    low, high = found["reward_mean"]["low"], found["reward_mean"]["high"]
    assert low[0] < 12.0 < high[0] and low[1] == 20.0 == high[1]
