"""Disks that fill up while a run writes, processes that are killed while they do, and clocks that jump."""

import csv
import json
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from full_disk import fill_disk, largest_file, small_disk
from lightning.pytorch.callbacks import ModelCheckpoint
from playground_fits import fit, module_of
from transformers import AutoModelForCausalLM

from tealightning import BestOfNReport, ExportPolicy, SampleTable
from tealightning.ablation import worker
from tealightning.callbacks import EvaluationRecord
from tealightning.estimators import optimal_tea
from tealightning.reliability.checkpoint import ResumableCheckpoint
from tealightning.reliability.checkpoint_files import VerifiedCheckpointIO, checkpoints, newest_good, step_of, verify
from tealightning.reliability.files import DurableCSVLogger, MetricsWriter, append_lines
from tealightning.types import Evaluation
from tealightning.worlds import StylesConfig
from tealightning.worlds.folder import build_folder, load_playground

VALIDATION = {"log_every_n_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": -1, "val_check_interval": 2}
STEPS = 6
REFUSED = range(2, 5)  # the disk is full from the end of the first of these steps to the end of the last


class FullFor(pl.Callback):
    """Has the disk refuse writes during some training steps."""

    def __init__(self, disk):
        self.disk = disk
        self.limit = largest_file(0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == REFUSED.start:
            self.filler = self.limit.__enter__() if self.disk is None else fill_disk(self.disk)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == REFUSED.stop:
            self.limit.__exit__(None, None, None) if self.disk is None else self.filler.unlink()


@pytest.fixture(scope="module")
def undisturbed(playground):
    return fit(playground, steps=STEPS, **VALIDATION)[1]


def read_metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.fault(
    "the disk is full for some steps", how="a file system of 8 MB, filled, or a limit on the size of files"
)
@pytest.mark.parametrize("kind", ["a file system", "a limit"])
def test_training_goes_on_over_a_full_disk_and_writes_afterwards(undisturbed, playground, tmp_path, kind, injected):
    callbacks = [BestOfNReport(), SampleTable(every_n_steps=1), EvaluationRecord(kl_samples=0, diversity_samples=2)]
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        if kind == "a limit":
            disk = None
        elif disk is None:
            pytest.skip("mounting a file system takes root; the other kind needs no privileges")
        folder = (disk or tmp_path) / "run"
        logger = DurableCSVLogger(folder, name="", version="")
        with pytest.warns(UserWarning, match="Could not write") as told:
            _, record = fit(playground, steps=STEPS, callbacks=[FullFor(disk), *callbacks], logger=logger, **VALIDATION)
        rows = read_metrics(folder)
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        evaluations = {path.name for path in (folder / "evaluations").iterdir()}
        left = {path.name for path in folder.iterdir()}
        table = (folder / "best_of_n.md").read_text()
    assert torch.equal(record.weights, undisturbed.weights)
    losses = [float(row["train/policy_loss"]) for row in rows if row["train/policy_loss"]]
    assert losses == undisturbed.series("train/policy_loss")  # those of the refused steps too
    assert len([row for row in rows if row["val/best_of_4"]]) == STEPS // 2
    assert evaluations == {f"val_{step:06d}.npz" for step in (0, 2, 4, 6)}
    steps = {row["step"] for row in samples if row["phase"] == "train"}
    assert {1, 5, 6} <= steps < {1, 2, 3, 4, 5, 6}  # the end of the file's last block may have taken some
    assert table.strip() == callbacks[0].table([1, 4])
    assert not [name for name in left if name.startswith(".")]
    messages = {str(warning.message) for warning in told}
    for what in ("metrics.csv; its rows are kept", "these are lost", "kept in memory", "best-of-n report"):
        assert [message for message in messages if what in message], messages
    injected(times=len(REFUSED), lost="rows of samples.jsonl of these steps")


@pytest.mark.fault("the disk stays full until training ends", how="a limit on the size of files from a step on")
def test_evaluations_that_are_never_written_fail_the_run(playground, tmp_path, injected):
    class FullAfterLoading(pl.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            limit.__enter__()

    record, limit = EvaluationRecord(kl_samples=0, diversity_samples=2), largest_file(0)
    logger = DurableCSVLogger(tmp_path, name="", version="")
    settings = VALIDATION | {"val_check_interval": 1}
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError) as error:
            warnings.simplefilter("ignore", UserWarning)
            fit(playground, steps=1, callbacks=[FullAfterLoading(), record], logger=logger, **settings)
    finally:
        limit.__exit__(None, None, None)
    assert "Evaluations could not be written: val_000000.npz, val_000001.npz" in str(error.value)
    assert record.is_behind("val", 1)  # so that a run that goes on evaluates again
    assert not list((tmp_path / "evaluations").iterdir())
    injected(times=2)


@pytest.fixture(scope="module")
def trained(playground):
    """A module with a loaded policy."""
    module = module_of(playground)
    module.configure_model()
    return module


def export_to(folder, module):
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=folder, enable_checkpointing=False)
    ExportPolicy().on_fit_end(trainer, module)


def set_weights(module, value):
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.fill_(value)


def exported_value(folder):
    """The one value that all weights of an exported policy have."""
    policy = AutoModelForCausalLM.from_pretrained(folder)
    (value,) = {float(v) for parameter in policy.parameters() for v in parameter.detach().flatten()[:1000]}
    return value


@pytest.mark.fault(
    "the disk is full while the policy is exported", how="a small file system, and a limit on files' size"
)
@pytest.mark.parametrize("kind", ["a file system", "a limit"])
def test_export_that_does_not_fit_leaves_the_older_one(trained, tmp_path, kind, injected):
    size = sum(p.numel() * p.element_size() for p in trained.policy.parameters())
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        if kind == "a limit":
            disk = None
        elif disk is None:
            pytest.skip("mounting a file system takes root; the other kind needs no privileges")
        folder = disk or tmp_path / "run"
        set_weights(trained, 1.0)
        export_to(folder, trained)
        set_weights(trained, 2.0)
        filler = fill_disk(disk) if disk else tmp_path / "none"
        with largest_file(size // 2 if disk is None else 2**40), pytest.raises(ValueError) as error:
            export_to(folder, trained)
        assert "The trained policy could not be written" in str(error.value)
        assert "an older one is as it was" in str(error.value)
        filler.unlink(missing_ok=True)
        assert exported_value(folder / "policy") == 1.0
        assert os.listdir(folder) == ["policy"]
    injected(times=1)


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: an fsync of a busy disk takes seconds."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


def kill_at_work(work, rng):
    """Run `work(count)` in a fork of this process and kill it in the middle, some time after its first round."""
    context = multiprocessing.get_context("fork")
    rounds = context.Value("i", 0)
    child = context.Process(target=work, args=(rounds,))
    child.start()
    deadline = time.monotonic() + 60
    while rounds.value == 0:
        assert child.is_alive() and time.monotonic() < deadline, "the process did not get to its first round"
        time.sleep(0.001)
    child.join(rng.uniform(0, 0.2))
    assert child.is_alive()
    child.kill()
    child.join(60)


@pytest.mark.fault("SIGKILL while the policy is exported", how="a process that only exports, at random moments")
def test_kill_during_an_export_leaves_the_old_or_the_new_one(trained, memory, injected):
    def work(rounds):
        for value in range(1_000_000):
            set_weights(trained, float(value))
            export_to(memory, trained)
            rounds.value += 1

    rng, seen, times = random.Random(0), set(), 20
    for _ in range(times):
        kill_at_work(work, rng)
        seen.add(exported_value(memory / "policy"))
    assert len(seen) > 1
    injected(times=times)


def evaluation(value):
    return Evaluation(step=int(value), keys=torch.arange(3), rewards=torch.rand(3, 4, dtype=torch.float64))


@pytest.mark.fault("SIGKILL while metrics and reports are written", how="a process that only writes, at random moments")
def test_kill_while_writing_leaves_whole_files(memory, injected):
    def work(rounds):
        writer, report = MetricsWriter(memory), BestOfNReport()
        report.before = evaluation(0.0)
        for step in range(1_000_000):
            writer.log_metrics({"train/loss": 0.25} | ({f"val/{step}": 0.5} if step % 40 == 0 else {}), step)
            writer.save()
            append_lines(memory / "samples.jsonl", json.dumps({"step": step, "text": "x" * 20_000}) + "\n")
            if step % 40 == 0:
                report.after = evaluation(float(step))
                report.write(memory, [1, 4])
            rounds.value += 1

    rng, times = random.Random(0), 20
    for killed in range(1, times + 1):
        kill_at_work(work, rng)
        MetricsWriter(memory)  # what a resumed run begins with: sets the file aside
        append_lines(memory / "samples.jsonl", "")
        for line in (memory / "samples.jsonl").read_text().splitlines():
            assert len(json.loads(line)["text"]) == 20_000
        files = list(memory.glob("metrics_*.csv"))
        assert len(files) == killed and not (memory / "metrics.csv").exists()
        for file in files:
            rows = list(csv.DictReader(file.open()))
            assert [int(row["step"]) for row in rows] == list(range(len(rows)))
            assert {row["train/loss"] for row in rows} == {"0.25"}
        for name, lines in (("best_of_n.md", 4), ("best_of_n.csv", 3), ("rewards_after.jsonl", 3)):
            assert len((memory / name).read_text().splitlines()) == lines
    injected(times=times)


def build(out, text, *, overwrite=False):
    def fill(folder, config, *, seed, progress):
        (folder / "prompts").write_text(text)
        return {"build_seconds": 0.0}

    recipe = {"format_version": 1, "text": text}
    return build_folder(out, recipe, StylesConfig(), fill, seed=0, progress=False, overwrite=overwrite)


@pytest.mark.fault("the disk is full while a playground is built", how="a limit on the size of files")
def test_playground_that_does_not_fit_leaves_the_older_one(tmp_path, injected):
    build(tmp_path / "playground", "old")
    with largest_file(1000), pytest.raises(OSError, match="too large"):
        build(tmp_path / "playground", "new" * 1000, overwrite=True)
    assert load_playground(tmp_path / "playground").manifest["text"] == "old"
    assert (tmp_path / "playground" / "prompts").read_text() == "old"
    assert os.listdir(tmp_path) == ["playground"]
    injected(times=1)


@pytest.mark.fault("the disk is full while an estimator's constants are cached", how="a limit on the size of files")
def test_constants_that_cannot_be_kept_are_computed(tmp_path, monkeypatch, injected):
    monkeypatch.setenv("TEALIGHTNING_CACHE", str(tmp_path))
    optimal_tea.constants.cache_clear()
    with largest_file(100):
        first = optimal_tea.constants(7, 3, "tail_rms")
    assert os.listdir(tmp_path) == []
    optimal_tea.constants.cache_clear()
    second = optimal_tea.constants(7, 3, "tail_rms")
    assert os.listdir(tmp_path) == ["optimal_tea-1-m7-k3-tail_rms.npz"]
    assert np.array_equal(first.signal, second.signal) and np.array_equal(first.noise, second.noise)
    optimal_tea.constants.cache_clear()
    injected(times=1)


@pytest.mark.fault("the clock jumps back and forth by days", how="time.time answers at random during a run")
def test_jumping_clock_changes_nothing(undisturbed, playground, tmp_path, monkeypatch, injected):
    rng, asked = random.Random(0), []

    def jumping():
        asked.append(rng.uniform(0, 4e9))
        return asked[-1]

    logger = DurableCSVLogger(tmp_path, name="", version="")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        _, record = fit(playground, steps=STEPS, logger=logger, callbacks=[SampleTable()], **VALIDATION)
    assert torch.equal(record.weights, undisturbed.weights)
    rows = read_metrics(tmp_path)
    seconds = [float(v) for row in rows for name, v in row.items() if name.endswith("_seconds") and v]
    assert len(seconds) >= 3 * STEPS and all(0 <= value < 300 for value in seconds)
    assert asked
    injected(times=len(asked))


@pytest.mark.fault("the disk is full while checkpoints are written", how="a limit on the size of files for some steps")
def test_checkpoint_that_does_not_fit_leaves_the_others_and_the_next_is_tried(
    undisturbed, playground, tmp_path, injected
):
    saver = ResumableCheckpoint(every_n_steps=1, keep=2)
    settings = {"plugins": [VerifiedCheckpointIO()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    folder, seen = tmp_path / "checkpoints", []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([path.name for path in checkpoints(folder)])

    with pytest.warns(UserWarning, match=r"checkpoint of step \d could not be written .*training goes on") as told:
        _, record = fit(playground, steps=STEPS, callbacks=[saver, FullFor(None), Look()], **settings | VALIDATION)
    assert torch.equal(record.weights, undisturbed.weights)
    assert len([warning for warning in told if "could not be written" in str(warning.message)]) == len(REFUSED)
    assert seen[2:5] == [["step=000001.ckpt"]] * 3
    assert [path.name for path in checkpoints(folder)] == ["step=000006.ckpt", "step=000005.ckpt"]
    assert all(verify(path) is not None for path in checkpoints(folder))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    injected(times=len(REFUSED))


@pytest.mark.fault("the disk is full for the last checkpoint", how="a limit on the size of files from a step on")
def test_last_checkpoint_that_does_not_fit_ends_the_run_with_what_to_do(playground, tmp_path, capsys, injected):
    saver = ResumableCheckpoint(every_n_steps=1)
    settings = {"plugins": [VerifiedCheckpointIO()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    full = FullFor(None)
    try:
        with (
            pytest.warns(UserWarning, match="could not be written"),
            pytest.raises(OSError, match="Free space on the disk"),
        ):
            fit(playground, steps=REFUSED.start, callbacks=[saver, full], **settings)
    finally:
        full.limit.__exit__(None, None, None)
    assert "The last step could not be saved: OSError" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step=000001.ckpt"]
    _, record = fit(
        playground, steps=REFUSED.start, ckpt_path=str(tmp_path / "checkpoints" / "step=000001.ckpt"),
        callbacks=[ResumableCheckpoint()], **settings,
    )  # fmt: skip
    assert len(record.steps) == 1
    injected(times=1, lost="the steps since the checkpoint before")


@pytest.mark.fault("the clock was set back between checkpoints", how="times of files opposite to their steps")
def test_newest_checkpoint_is_that_of_the_highest_step_whatever_the_clock_said(playground, tmp_path, injected):
    saver = ResumableCheckpoint(every_n_steps=1, keep=4)
    last = ModelCheckpoint(tmp_path / "other", every_n_train_steps=1, save_last=True, save_top_k=-1, filename="{step}")
    settings = {"plugins": [VerifiedCheckpointIO()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(playground, steps=3, callbacks=[saver, last], **settings)
    for folder in (tmp_path / "checkpoints", tmp_path / "other"):
        for age, path in enumerate(checkpoints(folder)):
            os.utime(path, (1e9 + 1e6 * age,) * 2)
        assert step_of(newest_good(folder, pytest.fail)) == 3
    assert step_of(worker._checkpoint(tmp_path)) == 3
    injected(times=7)
