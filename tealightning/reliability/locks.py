"""Lock a folder, or a run's folder, for one process."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import lightning.pytorch as pl

from tealightning.errors import UserError
from tealightning.reliability.files import run_folder

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_CHOOSING_SECONDS = 60.0  # for runs that start at once to choose their folders, all together


@contextmanager
def locked(folder: Path, message: str, *, wait_seconds: float = 0.0, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold a folder, made if it is missing, alone while the context lasts and this process lives; the file `name` in it
    says who does. If another process still holds it after `wait_seconds`, a UserError says `message` and who it is.

    The kernel gives the lock back however the process ends. A file system without locks is warned about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    # Not truncated: it is the other one's until the lock is this process's.
    with open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        while not _try(file, folder):
            if time.monotonic() >= deadline:
                raise UserError(f"{message}{_holder(file)}")
            time.sleep(0.2)
        # The first write to the folder, so that a full disk is noticed here.
        started = datetime.now(UTC).isoformat(timespec="seconds")
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, file)
        file.flush()
        os.fsync(file.fileno())
        yield


def _try(file: IO[str], folder: Path) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {folder} has no locks ({error.strerror}): see to it yourself that no two runs write "
            "into this folder.",
            stacklevel=2,
        )
    return True


def _holder(file: IO[str]) -> str:
    """` It is process 123 on host, since ...`; empty while the other one writes that."""
    try:
        holder = json.loads(file.read())
    except ValueError:
        return ""
    text = f" It is process {holder['pid']} on {holder['host']}, since {holder['started']}."
    is_here = holder["host"] == socket.gethostname() and Path("/proc/self").exists()
    if is_here and not Path("/proc", str(holder["pid"])).exists():
        text += " That process has ended, and one that it started still holds the folder."
    return text


@contextmanager
def claimed_run_folder(trainer: pl.Trainer, *, is_resumed: bool) -> Iterator[None]:
    """Hold the folder that the trainer's run writes into, while the context lasts; a UserError is raised if it is
    another run's, or cannot be written. A run that `is_resumed` may write where another one wrote that has ended.

    Runs that start at once and number their folders themselves get different ones. Ranks but the first hold nothing:
    under `torchrun` they are processes of the same run.
    """
    keeps_something = trainer.loggers or trainer.checkpoint_callbacks
    if not trainer.is_global_zero or trainer.fast_dev_run or not keeps_something:  # type: ignore[attr-defined]
        yield
        return
    with ExitStack() as held:
        try:
            root = getattr(trainer.logger, "root_dir", None)
            busy = f"Other runs have been choosing their folders in {root} for {_CHOOSING_SECONDS:.0f} s."
            choosing = locked(Path(root or "."), busy, wait_seconds=_CHOOSING_SECONDS, name=".versions.lock")
            with choosing if root else nullcontext():  # until the next free number has a folder
                folder = run_folder(trainer)
                in_use = f"{folder} is in use by a run. Wait until it ends, or let trainer.logger write elsewhere."
                held.enter_context(locked(folder, in_use))
        except OSError as error:
            raise UserError(
                f"The run's folder cannot be written: {error}. Let trainer.logger.save_dir (without a logger: "
                "trainer.default_root_dir) name a folder on a disk with space that you may write to."
            ) from error
        if trainer.loggers and not is_resumed:
            refuse_other_runs(folder / "config.yaml")
        yield


def refuse_other_runs(config: Path) -> None:
    """Raise a UserError if there is a run's config already."""
    if config.exists():
        raise UserError(f"{config} is another run's. Let trainer.logger write elsewhere, or delete that folder.")


def refuse_live_run(folder: Path, own: Path) -> None:
    """Raise a UserError if another process than this one, which holds `own`, writes into the folder of a run."""
    if folder.resolve() == own.resolve() or not (folder / LOCK_FILE).exists():
        return
    advice = f"{folder} is of a run that still goes on. Wait until it ends, or name a checkpoint to branch off from it."
    with locked(folder, f"--ckpt_path last: {advice}"):
        pass
