"""`tealightning diagnose gradients -c CONFIG` on the tiny playground."""

import csv
import json

import pytest
import torch
from command_line import PROSE, run
from run_records import quickstart_args

from tealightning.cli.diagnose_policy import collect_pool
from tealightning.errors import UserError
from tealightning.estimators import estimator_names
from tealightning.training.scoring import score_completions

SMALL = ["--prompts", "4", "--pool", "64", "-N", "16", "-m", "9", "--projection", "4"]


def config_of(playground, folder, engine="transformers_engine"):
    return [*quickstart_args("validate", playground, folder)[1:], f"--rollout.engine={engine}"]


def measure(*args):
    """Through the command line's entry point, as `diagnose gradients` hands it over."""
    return run("diagnose", "gradients", *args)


@pytest.fixture(scope="module")
def measured(playground, tmp_path_factory):
    """(result, folder) of a study with every estimator."""
    folder = tmp_path_factory.mktemp("policy")
    result = measure(*config_of(playground, folder), *SMALL, "--out", folder / "out")
    assert result.status == 0, result.err
    return result, folder / "out"


def test_study_has_every_estimator_that_suits_the_rewards(measured):
    result, folder = measured
    with (folder / "policy_fidelity.csv").open() as file:
        rows = list(csv.DictReader(file))
    unsuitable = {"pass_at_n", "grpo_lead", "max_rl"}
    assert {row["estimator"].partition("[")[0] for row in rows} == set(estimator_names()) - unsuitable
    assert "left out: grpo_lead, pass_at_n (for rewards of 0 and 1" in result.out
    assert "left out: max_rl (some rewards are too low: -" in result.out
    assert {row["m"] for row in rows} == {"9"}
    assert all(-1 <= float(row["cosine_raw"]) <= 1 for row in rows if not row["note"].startswith("refused"))


def test_study_writes_what_it_says(measured):
    result, folder = measured
    page = (folder / "policy_fidelity.md").read_text()
    for label, name in (("Page", "md"), ("Figures", "csv"), ("Plot", "png")):
        assert f"{label}: {folder / f'policy_fidelity.{name}'}" in result.out
        assert (folder / f"policy_fidelity.{name}").stat().st_size > 0
    table = [line for line in result.out.splitlines() if line.startswith("|")]
    assert len(table) > 5 and "\n".join(table) in page
    assert page.index("Noise ceiling") < page.index("| m | estimator |")
    assert "tealightning diagnose gradients -c " in page and "- commit: " in page
    assert "4 prompts (val) with 64 rollouts, 0 not scored, halves of 32" in page


def test_study_saves_the_rewards_of_the_pool(measured, playground):
    _, folder = measured
    lines = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["val-0000", "val-0001", "val-0002", "val-0003"]
    assert all(len(set(line["rewards"])) > 32 for line in lines)


def test_estimators_by_name_come_with_a_refusal_or_figures(playground, tmp_path):
    asked = ["--estimators", "grpo_lead", "tea:scale=none", "max_at_k:k=10"]
    result = measure(*config_of(playground, tmp_path), *SMALL, "--out", tmp_path / "out", *asked)
    assert result.status == 0, result.err
    table = [line for line in result.out.splitlines() if line.startswith("| 9 |")]
    assert [line.split(" | ")[1] for line in table] == ["grpo_lead", "tea[scale=none]", "max_at_k[k=10]"]
    assert "refused: max_at_k needs at least 10 rollouts" in table[2]
    assert "left out" not in result.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pool", "255"], "--pool must be at least 256"),
        (["-m", "1"], "-m: must be at least 2, got 1"),
        (["--prompts", "1"], "--prompts: must be at least 2"),
        (["--projection", "0"], "--projection: must be at least 1"),
        (["--estimators", "te"], "Did you mean 'tea'"),
        (["--rollout.grup_size=3"], "Unknown setting 'rollout.grup_size'"),
    ],
)
def test_errors_come_before_anything_is_sampled(args, message):
    result = measure("-c", PROSE, *args)
    assert result.status == 2
    assert message in result.err


def test_help_lists_the_options_and_says_where_the_others_go():
    result = measure("-c", "--help")
    assert result.status == 0
    for option in ("-N", "--pool", "--estimators", "--projection", "--seed", "--out"):
        assert option in result.out
    assert "every other option go to the config" in " ".join(result.out.split())


@pytest.mark.slow
def test_study_with_vllm(playground, tmp_path):
    pytest.importorskip("vllm")
    config = config_of(playground, tmp_path, engine="vllm_engine")
    result = measure(*config, *SMALL, "--estimators", "grpo", "--out", tmp_path / "out")
    assert result.status == 0, result.err
    assert "| 9 | grpo |" in result.out


# ---------------------------------------------------------------- the pool


@pytest.fixture(scope="module")
def collected(playground, tmp_path_factory):
    """The settings, and (module, pool) of three prompts with six rollouts each."""
    args = config_of(playground, tmp_path_factory.mktemp("pool"))
    return args, collect_pool(args, num_prompts=3, num_samples=6)


def test_collect_pool_has_the_first_prompts_of_the_split(collected, playground):
    _, (_, pool) = collected
    lines = (playground / "prompts" / "val.jsonl").read_text().splitlines()[:3]
    assert pool.ids == [json.loads(line)["id"] for line in lines]
    assert pool.rewards.shape == (3, 6)
    assert pool.rewards.isfinite().all()


def test_collect_pool_keeps_the_rollouts_behind_the_rewards(collected):
    """The module's policy gives the kept tokens the log-probs that they were sampled with."""
    _, (module, pool) = collected
    assert torch.equal(torch.cat([batch.rewards for batch in pool.batches]), pool.rewards)
    for batch in pool.batches:
        scores = score_completions(module.policy, batch, torch.arange(len(batch.completion_ids)))
        assert torch.allclose(scores.log_probs, batch.rollout_log_probs[:, : scores.log_probs.shape[1]], atol=1e-4)


def test_collect_pool_samples_what_validation_does(collected, tmp_path):
    """A seed and a prompt's id decide its samples: a smaller pool is the beginning of a larger one."""
    args, (_, pool) = collected
    _, smaller = collect_pool(args, num_prompts=2, num_samples=4)
    assert torch.allclose(smaller.rewards, pool.rewards[:2, :4], atol=1e-4)


def test_collect_pool_takes_the_test_split(collected):
    args, _ = collected
    _, pool = collect_pool(args, num_prompts=1, num_samples=2, split="test")
    assert pool.ids == ["test-0000"]


def test_collect_pool_refuses_more_prompts_than_there_are(collected):
    args, _ = collected
    with pytest.raises(ValueError, match=r"data\.val has 16 prompts, and 17 were asked for"):
        collect_pool(args, num_prompts=17, num_samples=2)


def test_collect_pool_refuses_several_devices(collected):
    args, _ = collected
    with pytest.raises(ValueError, match="a pool is collected on one device, got 2"):
        collect_pool([*args, "--trainer.devices=2", "--trainer.strategy=ddp"], num_prompts=1, num_samples=2)


def test_collect_pool_tells_of_a_mistyped_setting_like_any_command(collected):
    args, _ = collected
    with pytest.raises(
        UserError, match=r"Unknown setting 'rollout\.grup_size'\. Did you mean 'group_size'\?"
    ) as raised:
        collect_pool([*args, "--rollout.grup_size=4"], num_prompts=1, num_samples=2)
    assert run("validate", *args, "--rollout.grup_size=4").err == f"tealightning: error: {raised.value}\n"
