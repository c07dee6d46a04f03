"""Where callbacks write, and how."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's own folder: the first logger's, else the trainer's root. Collective under DDP: call it on all ranks.

    Loggers that keep no folder of a run themselves, wandb for one, get `<save_dir>/<name>/<version>`, the place where
    Lightning puts their checkpoints. A trial run (`trainer.fast_dev_run`) gets one outside the working folder.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # set by Lightning's debugging connector
        return Path(tempfile.gettempdir()) / "tealightning_dev_run"
    root = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return root
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return root.joinpath(*trainer.strategy.broadcast(parts))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either the new one or, after any error, the old one."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to (and read back) that takes the name `path` when the context ends without an error, and is on
    the disk then. After an error, or a crash at any moment, `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, too: a file's own `fsync` does not promise that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_metrics(folder: Path) -> None:
    """Put a `metrics.csv` that is there aside, as `metrics_<k>.csv`: Lightning's CSV logger deletes it and begins
    anew."""
    if (folder / "metrics.csv").is_file():
        earlier = len(list(folder.glob("metrics_*.csv")))
        os.replace(folder / "metrics.csv", folder / f"metrics_{earlier:03d}.csv")
