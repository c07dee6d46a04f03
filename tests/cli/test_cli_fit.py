"""Whole runs from the command line."""

import csv
import json
import subprocess
import sys

import pytest
import yaml
from command_line import PROSE, overlay, resolved, run
from run_records import quickstart_args

CHECKPOINTS = {
    "trainer": {
        "enable_checkpointing": True,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True},
            }
        ],
    }
}


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_resume_from_the_command_line(playground, tmp_path):
    """Step 2 of a run that was stopped after step 1 is that of a run of two steps, written into the same folder."""
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    checkpoints = overlay(tmp_path, CHECKPOINTS)
    engine = "--rollout.engine=transformers_engine"
    for folder, steps in ((unbroken, 2), (stopped, 1)):
        folder.mkdir()
        args = quickstart_args("fit", playground, folder)
        result = run(*args, engine, "-c", checkpoints, f"--trainer.max_steps={steps}")
        assert result.status == 0, result.err
    last = stopped / "checkpoints" / "last.ckpt"
    again = run("fit", "-c", stopped / "config.yaml", f"--ckpt_path={last}", "--trainer.max_steps=2")
    assert again.status == 0, again.err
    assert yaml.safe_load((stopped / "config.yaml").read_text())["ckpt_path"] == str(last)
    (resumed,), second = rows(stopped), rows(unbroken)[1]
    assert resumed["rollout/step"] == "1.0"
    for key in ("rollout/reward_mean", "train/entropy", "train/grad_norm"):
        assert float(resumed[key]) == pytest.approx(float(second[key]), rel=1e-6)


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluation_from_the_command_line(playground, tmp_path, command, prefix):
    args = quickstart_args(command, playground, tmp_path, limit_val_batches=1, limit_test_batches=1)
    result = run(*args, "--rollout.engine=transformers_engine", "--model.estimator=grpo")
    assert result.status == 0, result.err
    (row,) = rows(tmp_path)
    assert float(row[f"{prefix}/best_of_4"]) > float(row[f"{prefix}/best_of_1"])


@pytest.fixture(scope="module")
def finished(playground, tmp_path_factory):
    """The prose experiment with three steps in a process of its own: (what it printed, the run's folder)."""
    folder = tmp_path_factory.mktemp("prose")
    prompts = {phase: str(playground / "prompts" / f"{phase}.jsonl") for phase in ("train", "val", "test")}
    settings = {
        "model": {"init_args": {"policy": str(playground / "policy"), "ns": [1, 4]}},
        "data": {"init_args": prompts},
        "rollout": {
            "engine": "transformers_engine",
            "reward": {"init_args": {"model": str(playground / "reward_model")}},
            "sampling": {"max_new_tokens": 12},
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": {"init_args": {"save_dir": str(folder)}}},
    }
    command = [sys.executable, "-m", "tealightning", "fit", "-c", PROSE, "-c", overlay(folder, settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, folder / "prose" / "version_0"


@pytest.mark.slow
def test_fit_prints_no_noise(finished):
    printed, _ = finished
    for noise in ("Tip:", "arning", "Loading weights", "Writing model shards", "Traceback", "deprecated"):
        lines = [line for line in printed.splitlines() if noise in line and "NUMA" not in line]
        assert lines == []


@pytest.mark.slow
def test_fit_prints_the_table_and_says_where_everything_is(finished):
    printed, folder = finished
    assert "before training (step 0) and after (step 3)" in printed
    assert (folder / "best_of_n.md").read_text().strip() in printed
    for told, file in (("Table", "best_of_n.md"), ("Curve", "best_of_n.png"), ("Trained policy", "policy")):
        assert f"{told}: {folder / file}" in printed


@pytest.mark.slow
def test_fit_writes_what_it_says(finished):
    _, folder = finished
    for name in ("best_of_n.csv", "best_of_n.png", "policy/model.safetensors", "policy/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in samples} == {"train", "val"}
    assert len([row for row in rows(folder) if row["train/grad_norm"]]) == 3
    assert resolved("-c", folder / "config.yaml")["trainer"]["max_steps"] == 3
