"""Write files, folders and logged metrics atomically, whatever the disk or a signal does meanwhile."""

import contextlib
import csv
import ctypes
import io
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from torch import Tensor


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either the new one or, after any error, the old one."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path`, and is on the disk, once the context ends without an error.

    After an error, or a crash at any moment, `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(name, 0o644)  # mkstemp's files are for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def check_writable(folder: Path) -> None:
    """Make a folder if it is missing, and write into it on trial; an OSError says what is in the way."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def sync(path: Path) -> None:
    """Bring a file's content to the disk, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines: after an error none of them is there, and a half line that a killed process left is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        if end > 0:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
        file.truncate(end)
        rest = memoryview(lines.encode())
        try:
            while rest:  # a disk that fills up takes a part of the first write
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(end)
            raise


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` once the context ends without an error.

    Where the file system cannot exchange two names (as Linux can), a kill between two renames leaves the older one
    beside `target`, under a name that begins with a dot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = workspace / "new", workspace / "old"
    new.mkdir()
    try:
        yield new
        for file in filter(Path.is_file, new.rglob("*")):
            sync(file)
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


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Downgrade an OSError to a warning, for output that a run can do without; `what` also says what becomes of it."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"Could not write {what} ({error}). The run goes on.", stacklevel=3)


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's own folder: the first logger's, else the trainer's root. Collective under DDP: call it on all ranks.

    Loggers that keep no folder of a run themselves, wandb for one, get `<save_dir>/<name>/<version>`, the place where
    Lightning puts their checkpoints. A trial run (`trainer.fast_dev_run`) gets one outside the working folder."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # set by Lightning's debugging connector
        return Path(tempfile.gettempdir()) / "tealightning_dev_run"
    root = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return root
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return root.joinpath(*trainer.strategy.broadcast(parts))


class DurableCSVLogger(CSVLogger):
    """`CSVLogger`, with the same arguments and the same file. The command line puts it in the place of a plain one.

    - What the disk refuses stays in memory, with a warning, and is written once there is space again.
    - A column that is new replaces the file by a whole new one; Lightning's would empty the old one first.
    - A file of an earlier process becomes `metrics_000.csv` and so on; Lightning's would delete it.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment: Any = MetricsWriter(Path(self.log_dir))
        return self._experiment


class MetricsWriter:
    """Rows of `metrics.csv` in a folder, which is made if it is missing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        set_aside_metrics(folder)
        self.folder, self.file = folder, folder / "metrics.csv"
        self.metrics: list[dict[str, Any]] = []  # not yet written
        self.hparams: dict[str, Any] = {}
        self._columns: list[str] = []  # of the file; empty = there is none

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write `hparams.yaml`."""
        self.hparams |= params
        file, new = self.folder / "hparams.yaml", self.folder / ".hparams.yaml"
        with going_on_without(f"{file}, which only repeats settings"):
            save_hparams_to_yaml(str(new), self.hparams)
            os.replace(new, file)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int) -> None:
        """Take a row."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics_dict.items()}
        self.metrics.append(row | {"step": step})

    def save(self) -> None:
        """Write the rows taken since the last call that could."""
        if not self.metrics:
            return
        columns = sorted(set(self._columns).union(*self.metrics))
        with going_on_without(f"{self.file}; its rows are kept in memory and written when that works"):
            if columns == self._columns:
                append_lines(self.file, _csv(columns, self.metrics))
            else:
                written: list[dict[str, Any]] = []
                if self._columns:
                    with self.file.open(newline="", encoding="utf-8") as text:
                        written = list(csv.DictReader(text))
                header = dict(zip(columns, columns, strict=True))
                write_whole(self.file, _csv(columns, [header, *written, *self.metrics]).encode())
            self._columns, self.metrics = columns, []


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, fieldnames=columns).writerows(rows)
    return text.getvalue()


def set_aside_metrics(folder: Path) -> None:
    """Rename the `metrics.csv` of an earlier process to `metrics_<i>.csv`, i counting from 0."""
    file = folder / "metrics.csv"
    if file.is_file():
        append_lines(file, "")  # cuts a half line
        ends = [path.stem.removeprefix("metrics_") for path in folder.glob("metrics_*.csv")]
        number = max((int(end) for end in ends if end.isdigit()), default=-1) + 1
        os.rename(file, folder / f"metrics_{number:03d}.csv")
