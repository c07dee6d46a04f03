"""CSV logger that survives a full disk and keeps the metrics of an earlier process."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from torch import Tensor

from tealightning.reliability.files import append_lines, cut_half_line, going_on_without, write_whole

METRICS_FILE = "metrics.csv"


class DurableCSVLogger(CSVLogger):
    """`CSVLogger`, with the same arguments and the same file. The command line puts it in the place of a plain one.

    - What the disk refuses stays in memory, with a warning, and is written once there is space again.
    - A column that is new replaces the file by a whole new one; Lightning's would empty the old one first.
    - A file of an earlier process becomes `metrics_000.csv` and so on; Lightning's would delete it.
    """

    @classmethod
    def taking_over(cls, logger: CSVLogger) -> "DurableCSVLogger":
        """A logger with the settings of a plain one."""
        durable = cls.__new__(cls)
        durable.__dict__.update(logger.__dict__)
        return durable

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What rows are handed to."""
        if self._experiment is None:
            self._experiment: Any = MetricsWriter(Path(self.log_dir))
        return self._experiment


class MetricsWriter:
    """Rows for `metrics.csv` in a folder, which is made if it is missing.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder)
        self.folder = folder
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
        with going_on_without(f"{self.folder / METRICS_FILE}; its rows are kept in memory and written when that works"):
            self._write()
            self.metrics = []

    def _write(self) -> None:
        file = self.folder / METRICS_FILE
        columns = sorted(set(self._columns).union(*self.metrics))
        if columns == self._columns:
            append_lines(file, _csv(columns, self.metrics, header=False))
        else:
            written: Sequence[dict[str, Any]] = []
            if self._columns:
                with file.open(newline="", encoding="utf-8") as text:
                    written = list(csv.DictReader(text))
            write_whole(file, _csv(columns, [*written, *self.metrics], header=True).encode())
        self._columns = columns


def set_aside(folder: Path) -> None:
    """Rename the `metrics.csv` of an earlier process to `metrics_<i>.csv`, i counting from 0."""
    file = folder / METRICS_FILE
    if file.is_file():
        cut_half_line(file)
        ends = [path.stem.removeprefix("metrics_") for path in folder.glob("metrics_*.csv")]
        number = max((int(end) for end in ends if end.isdigit()), default=-1) + 1
        os.rename(file, folder / f"metrics_{number:03d}.csv")


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
