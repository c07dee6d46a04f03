"""The folder of a run: taken by one process, refused to others, found unwritable before anything is loaded."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
from command_line import run
from full_disk import fill_disk, small_disk
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from run_records import quickstart_args

from tealightning.reliability.locks import claimed_run_folder

START_SECONDS = 180.0


def refuse_loading(patch):
    """Whatever would load a model or a tokenizer fails the test."""

    def load(*args, **kwargs):
        pytest.fail("something was loaded before the run was refused")

    for loader in ("load_policy", "load_tokenizer"):
        patch.setattr(f"tealightning.training.policy_module.{loader}", load)


@pytest.fixture
def nothing_loads(monkeypatch):
    refuse_loading(monkeypatch)


@pytest.fixture
def live_run(playground, tmp_path):
    """A training run in a process of its own that has written its first metrics: (process, command, folder)."""
    settings = {
        "max_steps": 100_000,
        "enable_checkpointing": True,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True},
            }
        ],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "name": "runs", "version": None},
        },
    }
    args = [*quickstart_args("fit", playground, tmp_path, **settings), "--rollout.engine=transformers_engine"]
    folder = tmp_path / "runs" / "version_0"
    process = subprocess.Popen([sys.executable, "-m", "tealightning", *args], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not all((folder / name).exists() for name in ("checkpoints/last.ckpt", "metrics.csv")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, f"no checkpoint within {START_SECONDS:.0f} s"
            time.sleep(0.1)
        yield process, args, folder
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.fault(
    "a second run starts in the folder of a live one, which is then killed",
    how="fit, resume and test with the folder of a training process, before and after SIGKILL",
)
def test_folder_of_a_live_run_is_refused_and_free_once_it_was_killed(live_run, monkeypatch, injected):
    process, args, folder = live_run
    here = "--trainer.logger.version=version_0"
    last = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    before = (folder / "metrics.csv").read_text()
    with monkeypatch.context() as patch:
        refuse_loading(patch)
        for command in ([*args, here], [*args, here, last], ["test", *args[1:], here]):
            result = run(*command)
            assert result.status == 2, result.err
            assert f"{folder} is in use by a run." in result.err
            assert f"It is process {process.pid} on {socket.gethostname()}, since 20" in result.err
        result = run(*args, "--ckpt_path=last")  # in a folder of its own, but the run is still under way
        assert result.status == 2, result.err
        assert f"{folder} is of a run that still goes on." in result.err and f"process {process.pid}" in result.err
    assert (folder / "metrics.csv").read_text().startswith(before)
    assert not list(folder.glob("metrics_*"))

    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    logged = (folder / "metrics.csv").read_bytes()
    result = run(*args, here, last, "--trainer.max_time=00:00:00:00", "--trainer.enable_checkpointing=true")
    assert result.status == 0, result.err
    kept = (folder / "metrics_000.csv").read_bytes()
    assert kept == logged[: logged.rfind(b"\n") + 1]
    injected(times=5)


def claim(root, logger_class, barrier, results):
    logger = logger_class(root, name="runs")
    trainer = pl.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
    barrier.wait(60)
    with claimed_run_folder(trainer, is_resumed=False):
        Path(logger.log_dir, "config.yaml").touch()
        results.put(logger.log_dir)
        barrier.wait(60)


@pytest.mark.fault(
    "runs start at the same moment", how="6 processes wait for each other, then choose a version; 5 rounds"
)
def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, injected):
    processes, rounds = 6, 5
    context = multiprocessing.get_context("fork")
    for number in range(rounds):
        barrier, results = context.Barrier(processes), context.Queue()
        logger_class = TensorBoardLogger if number == 0 else CSVLogger
        arguments = (tmp_path / str(number), logger_class, barrier, results)
        children = [context.Process(target=claim, args=arguments) for _ in range(processes)]
        for child in children:
            child.start()
        folders = [results.get(timeout=60) for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        expected = [str(tmp_path / str(number) / "runs" / f"version_{v}") for v in range(processes)]
        assert sorted(folders) == expected
    injected(times=processes * rounds)


def refused(args, folder):
    result = run(*args, f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=runs")
    assert result.status == 2
    assert "The run's folder cannot be written" in result.err
    assert "trainer.logger.save_dir" in result.err and "Traceback" not in result.err
    return result.err


def fit_args(playground, tmp_path):
    return [*quickstart_args("fit", playground, tmp_path), "--rollout.engine=transformers_engine"]


@pytest.mark.fault(
    "the output folder cannot be written", how="it is in a system folder or in a file, and a read-only mount"
)
def test_folder_that_cannot_be_written_is_found_before_anything_loads(playground, tmp_path, nothing_loads, injected):
    args = fit_args(playground, tmp_path)
    (tmp_path / "file").write_text("no folder")
    refused(args, "/sys/tealightning")
    assert "Not a directory" in refused(args, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "no folder"
    times = 2
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        if disk is not None:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            assert "Read-only file system" in refused(args, disk)
            times += 1
    injected(times=times)


@pytest.mark.fault(
    "the disk is full when a run starts", how="a file system of 1 MB, filled; and a limit on the size of files"
)
def test_full_disk_is_found_before_anything_loads(playground, tmp_path, nothing_loads, monkeypatch, injected):
    args = fit_args(playground, tmp_path)
    times = 1
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        if disk is not None:
            fill_disk(disk)
            assert "No space left on device" in refused(args, disk)
            times += 1

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused(args, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("metrics.csv"))
    injected(times=times)


@pytest.mark.fault("a run is started again in the folder of one that has ended", how="fit twice with the same version")
def test_folder_of_an_ended_run_is_refused_and_keeps_its_metrics(playground, tmp_path, nothing_loads, injected):
    folder = tmp_path / "runs" / "version_0"
    folder.mkdir(parents=True)
    for name, text in (("config.yaml", "seed_everything: 1\n"), ("metrics.csv", "step\n1\n")):
        (folder / name).write_text(text)
    options = ["--trainer.logger.name=runs", "--trainer.logger.version=version_0"]
    result = run(*fit_args(playground, tmp_path), *options)
    assert result.status == 2
    assert f"{folder / 'config.yaml'} is another run's." in result.err
    assert (folder / "metrics.csv").read_text() == "step\n1\n"
    assert (folder / "config.yaml").read_text() == "seed_everything: 1\n"
    injected(times=1)
