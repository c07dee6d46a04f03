"""Write files and folders atomically, whatever the disk or a signal does meanwhile; the folder of a run."""

import contextlib
import ctypes
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines: after an error none of them is there, and a half line that a killed process left is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
        end = _end_of_lines(file.fileno())
        file.truncate(end)
        file.seek(end)
        rest = memoryview(lines.encode())
        try:
            while rest:  # a disk that fills up takes a part of the first write
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(end)
            raise


def cut_half_line(path: Path) -> None:
    """Remove what follows the last line break of a file: a process was killed while it wrote that."""
    with path.open("r+b", buffering=0) as file:
        file.truncate(_end_of_lines(file.fileno()))


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` once the context ends without an error.

    Until then `target` is what it was. Where the file system can exchange two names (Linux), there is no moment without
    it; elsewhere a kill between two renames leaves the older one beside it, under a name that begins with a dot.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = workspace / "new", workspace / "old"
    new.mkdir()
    try:
        yield new
        _sync_files(new)
        if not os.path.lexists(target):
            os.replace(new, target)
        elif not _exchange(new, target):
            os.replace(target, old)
            try:
                os.replace(new, target)
            except BaseException:
                os.replace(old, target)
                raise
    finally:
        shutil.rmtree(workspace)


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """For a write that a run can do without: if the disk refuses it, there is a warning and the run goes on.

    Args:
        what: Was to be written, and what becomes of it.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(f"Could not write {what} ({error}). The run goes on.", stacklevel=3)


def _end_of_lines(descriptor: int) -> int:
    """Bytes up to and with the last line break."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 2**16)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _sync_files(folder: Path) -> None:
    """Have the disk hold what is in the folder before its name says that it is complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


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
