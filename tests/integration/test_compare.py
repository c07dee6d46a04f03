"""`tealightning compare` for real: processes, failures of all kinds, a kill, and the results that are left."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import PROSE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NO_SPACE = "a disk of 16 KiB for one variant's runs"


def write_spec(folder, playground, variants):
    """A spec of a few seconds a run; its file."""
    crash = folder / "crash.py"
    crash.write_text("def reward(prompts, completions, metadata):\n    raise KeyError('meant to fail')\n")
    prompts = playground / "prompts"
    spec = {
        "name": "trial",
        "out": str(folder / "out"),
        "base": [PROSE],
        "settings": {
            "model.policy": str(playground / "policy"),
            **{f"data.{split}": str(prompts / f"{split}.jsonl") for split in ("train", "val", "test")},
            "data.batch_size": 4,
            "rollout.engine": "transformers_engine",
            "rollout.reward.init_args.model": str(playground / "reward_model"),
            "rollout.group_size": 12,
            "rollout.sampling.max_new_tokens": 8,
            "trainer.callbacks": None,
            "trainer.enable_checkpointing": False,
            "trainer.accelerator": "cpu",
        },
        "variants": {name: settings | {} for name, settings in variants.items()},
        "reference": "grpo",
        "seeds": [0, 1],
        "equal": {"optimizer_steps": 3},
        "evaluation": {"ns": [1, 4, 8], "prompts": 8, "held_out_prompts": 8, "every": 2},
        "bootstrap_samples": 200,
    }
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file


GOOD = {"grpo": {"model.estimator": "grpo"}, "tea": {"model.estimator": "tea"}}


def bad(folder):
    return {
        "crash": {
            "rollout.reward": "function_reward",
            "rollout.reward.function": f"{folder / 'crash.py'}:reward",
        },
        "nan": {"model.estimator": "grpo", "model.optimizer.init_args.lr": 1e30},
        "full": {"model.estimator": "grpo", "model.inner_epochs": 2},
    }


def command(file, *options):
    return [sys.executable, "-m", "tealightning", "compare", "-c", str(file), "--workers", "2", *options]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def results_of(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def numbers_of(results):
    """What must not depend on when and where it was computed."""
    return {key: results[key] for key in ("variants", "splits", "checkpoints", "equal_kl", "training", "histograms")}


@pytest.fixture(scope="module")
def with_failures(playground, tmp_path_factory):
    """An ablation in which a variant crashes, one becomes NaN, and one's disk is full; the process and its folder."""
    folder = tmp_path_factory.mktemp("failures")
    file = write_spec(folder, playground, GOOD | bad(folder))
    disk = folder / "out" / "runs" / "full"
    disk.mkdir(parents=True)
    mounted = f"mount -t tmpfs -o size=16k tmpfs {disk} && exec " + " ".join(command(file))
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    if shutil.which("unshare") is None or subprocess.run([*isolated[:4], "true"], check=False).returncode:
        pytest.skip(f"{NO_SPACE} needs user namespaces")
    done = subprocess.run(isolated, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    return folder, done


def test_failures_leave_the_other_results_intact_and_are_told(with_failures):
    folder, done = with_failures
    assert done.returncode == 1, done.stdout + done.stderr
    results = results_of(folder)
    assert results["variants"] == ["grpo", "tea"]
    errors = {(run["variant"], run["seed"]): run["error"] for run in results["runs"] if run["status"] != "finished"}
    failed = ("start", "crash", "nan", "full")  # the start of the variant whose reward crashes
    assert set(errors) == {(name, seed) for name in failed for seed in (0, 1)}
    for seed in (0, 1):
        assert "meant to fail" in errors["crash", seed]
        assert "No space left on device" in errors["full", seed]
        assert "NaN" in errors["nan", seed] or "is nan" in errors["nan", seed]
        assert f"failed: crash, seed {seed}: FunctionRaisedError" in done.stdout
    assert "8 of 14 runs are not in these results" in done.stdout
    assert "meant to fail" in (folder / "out" / "report.html").read_text()
    assert (folder / "out" / "table.tex").exists()


def test_report_only_gives_the_same_numbers_and_runs_nothing(with_failures):
    folder, _ = with_failures
    before = numbers_of(results_of(folder))
    records = {file: file.read_bytes() for file in (folder / "out").rglob("run.json")}
    done = subprocess.run(
        command(folder / "trial.yaml", "--report-only"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert numbers_of(results_of(folder)) == before
    assert {file: file.read_bytes() for file in (folder / "out").rglob("run.json")} == records


def test_a_kill_costs_only_the_runs_that_were_going(playground, tmp_path, with_failures):
    file = write_spec(tmp_path, playground, GOOD)
    process = subprocess.Popen(command(file), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not finished(tmp_path, "grpo") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = {path: path.read_bytes() for path in finished(tmp_path)}
    assert 3 <= len(kept) < 6  # both starting policies and a run, not all of them
    done = subprocess.run(command(file), env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(finished(tmp_path)) == 6
    whole, resumed = results_of(with_failures[0]), results_of(tmp_path)
    assert (
        numbers_of(resumed)["splits"]["val"]["variants"]["tea"]["best_of_n"]
        == (numbers_of(whole)["splits"]["val"]["variants"]["tea"]["best_of_n"])
    )
    again = subprocess.run(command(file), env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert "All 6 runs have finished already." in again.stdout


def test_a_run_with_checkpoints_goes_on_where_it_was_cut_off(playground, tmp_path):
    """The run is stopped in its third step by a reward that fails once; the next call resumes it."""
    once = tmp_path / "once.py"
    once.write_text(
        "from pathlib import Path\n"
        "calls = 0\n"
        "def reward(prompts, completions, metadata):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    mark = Path({str(tmp_path / 'failed')!r})\n"
        "    if calls == 3 and not mark.exists() and len(completions) == 48:\n"
        "        mark.touch()\n"
        "        raise RuntimeError('meant to fail once')\n"
        "    return [float(len(text) % 7) for text in completions]\n"
    )
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 1, "save_last": True, "save_top_k": 0},
    }
    variant = {
        "model.estimator": "grpo",
        "rollout.reward": "function_reward",
        "rollout.reward.function": f"{once}:reward",
        "trainer.callbacks": [checkpoint],
        "trainer.enable_checkpointing": True,
    }

    def compare(folder):
        file = write_spec(folder, playground, {"grpo": variant})
        spec = yaml.safe_load(file.read_text()) | {"seeds": [0], "equal": {"optimizer_steps": 6}}
        spec["evaluation"] |= {"every": 4, "held_out_prompts": 0}
        file.write_text(yaml.safe_dump(spec))
        return subprocess.run(command(file), env=environment(), capture_output=True, text=True, check=False)

    first = compare(tmp_path)
    assert first.returncode == 2 and "meant to fail once" in first.stdout, first.stdout + first.stderr
    second = compare(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    (record,) = [json.loads(file.read_text()) for file in finished(tmp_path, "grpo")]
    assert (record["resumed"], record["optimizer_steps"], record["rollouts"]) == (True, 6, 6 * 48)
    (tmp_path / "whole").mkdir()
    whole = compare(tmp_path / "whole")  # the mark is there: nothing fails
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert numbers_of(results_of(tmp_path)) == numbers_of(results_of(tmp_path / "whole"))


def test_estimator_of_a_plugin_and_upload_to_wandb(playground, tmp_path):
    plugin = tmp_path / "top_of_three.py"
    plugin.write_text(
        "from tealightning import register\n"
        "from tealightning.estimators import AdvantageEstimator\n\n"
        "@register\n"
        "class TopOfThree(AdvantageEstimator):\n"
        "    def compute(self, rewards):\n"
        "        return (rewards - rewards.mean(dim=1, keepdim=True)).clamp(min=0)\n"
    )
    variants = {"grpo": GOOD["grpo"], "own": {"model.estimator": "top_of_three"}}
    file = write_spec(tmp_path, playground, variants)
    options = ["--import", str(plugin), "--seeds", "0", "--wandb", "trial"]
    offline = environment() | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run(command(file, *options), env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results_of(tmp_path)["variants"] == ["grpo", "own"]
    assert "Uploaded to" in done.stdout
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_dry_run_measures_a_pilot_and_runs_nothing(playground, tmp_path):
    file = write_spec(tmp_path, playground, GOOD)
    done = subprocess.run(command(file, "--dry-run"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 runs, 0 finished, 6 to do" in done.stdout
    assert "Time: about" in done.stdout
    assert not (tmp_path / "out").exists()


def finished(folder, variant="*"):
    """run.json of the runs that finished."""
    found = sorted((folder / "out" / "runs").glob(f"{variant}/*/run.json"))
    return [Path(file) for file in found if json.loads(file.read_text())["status"] == "finished"]
