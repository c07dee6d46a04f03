import json

import numpy as np
import pytest
import torch
from command_line import overlay, run
from run_records import quickstart_args

from tealightning.callbacks.report import reward_lines
from tealightning.types import Evaluation


@pytest.fixture(scope="module")
def rewards():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((64, 128)))


def test_a_file_of_rewards_gives_a_report(tmp_path, rewards):
    file = tmp_path / "rewards.jsonl"
    file.write_text("".join(json.dumps({"rewards": row}) + "\n" for row in rewards.tolist()))
    result = run("diagnose", "tail", "--rewards", file, "--out", tmp_path / "out", "-m", "32", "--ns", "16", "64")
    assert result.status == 0, result.err
    assert "Verdict: **gaussian**" in result.out and "| 64 | " in result.out
    page = (tmp_path / "out" / "tail.md").read_text()
    assert f"tealightning diagnose tail --rewards {file} --out {tmp_path / 'out'} -m 32 --ns 16 64" in page
    assert str(tmp_path / "out" / "prediction.png") in result.out
    record = json.loads((tmp_path / "out" / "tail.json").read_text())
    assert "Tested: the upper 0.5 of each prompt's rewards, 64 samples" in result.out
    assert record["m"] == 32 and [row["n"] for row in record["predictions"]] == [16, 64]


def test_a_runs_rewards_before_and_after(tmp_path, rewards):
    for name, values in (("before", rewards), ("after", (rewards > 0).double())):
        evaluation = Evaluation(step=0, keys=torch.arange(64), rewards=values)
        (tmp_path / f"rewards_{name}.jsonl").write_text(reward_lines(evaluation))
    after = run("diagnose", "tail", "--run", tmp_path, "--out", tmp_path / "after")
    before = run("diagnose", "tail", "--run", tmp_path, "--which", "before", "--out", tmp_path / "before")
    assert "Verdict: **binary**" in after.out and "Verdict: **gaussian**" in before.out


def test_a_policy_is_sampled_from_its_config(playground, tmp_path):
    config = quickstart_args("fit", playground, tmp_path)[1:]  # -c prose -c overlay
    lengths = overlay(tmp_path, {"rollout": {"sampling": {"max_new_tokens": 4}}}, "lengths.yaml")
    result = run(
        *("diagnose", "tail", *config, "-c", lengths, "--rollout.engine", "transformers_engine"),
        *("--prompts", "3", "--samples", "40", "--out", tmp_path / "out"),
    )
    assert result.status == 0, result.err
    assert "Sampling 40 completions for each of 3 prompts" in result.out
    record = json.loads((tmp_path / "out" / "tail.json").read_text())
    assert (record["prompts"], record["samples"]) == (3, 40)
    assert record["summary"]["tail_shape_gaussian"] < 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "one of the arguments --rewards --run -c/--config is required"),
        (("--rewards", "x", "--run", "y"), "not allowed with argument"),
        (("--rewards", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--run", "nowhere"), "rewards_after.jsonl: no such file. The callback BestOfNReport writes it"),
        (("--rewards", "x", "--model.policy=y"), "Unknown options: --model.policy=y"),
        (("--rewards", "x", "--alpha", "2"), "--alpha: must be in (0, 1], got 2"),
        (("--rewards", "x", "--tested-share", "0"), "--tested-share: must be in (0, 1], got 0"),
        (("--rewards", "x", "-m", "0"), "--group-size: must be at least 1, got 0"),
        (("--rewards", "x", "--seed", "-1"), "--seed: must be at least 0, got -1"),
        (("-c", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_what_does_not_go_together_is_one_message(args, message):
    result = run("diagnose", "tail", *args)
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err


def test_bad_rewards_are_one_message_with_file_and_line(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"rewards": [1, 2]}\n{"rewards": "none"}\n')
    result = run("diagnose", "tail", "--rewards", tmp_path / "r.jsonl")
    assert result.status == 2
    assert f"{tmp_path}/r.jsonl, line 2: expected" in result.err


def test_budgets_beyond_the_held_out_samples_are_one_message(tmp_path, rewards):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"rewards": row}) + "\n" for row in rewards[:3].tolist()))
    result = run("diagnose", "tail", "--rewards", tmp_path / "r.jsonl", "--ns", "128", "--out", tmp_path / "out")
    assert result.status == 2
    assert "ns must lie between 1 and M - m = 128 - 16 = 112, got [128]" in result.err
    assert not (tmp_path / "out").exists()


def test_help_says_what_the_files_look_like():
    result = run("diagnose", "tail", "--help")
    assert result.status == 0
    assert '{"rewards": [0.1, 2.3, null]' in result.out and "prompt_id and reward" in result.out
