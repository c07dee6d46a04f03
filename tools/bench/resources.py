"""Callback that records what a run takes from its machine, step by step, for `tools/soak.py`."""

import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
from lightning.pytorch.callbacks import Callback

COLUMNS = ("step", "seconds", "rss_mib", "open_files", "threads")


class ResourceRecorder(Callback):
    """Appends a row a step to `<folder>/part_<part>_rank_<rank>.csv`: seconds without validation, and the rank's own
    memory, open files and threads (an engine in the rank's process is part of it).

    Args:
        folder: Where the files go.
        part: Of the soak run.
    """

    def __init__(self, folder: str, part: int) -> None:
        self.folder = Path(folder)
        self.part = part
        self._process = psutil.Process()
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        file = self.folder / f"part_{self.part}_rank_{trainer.global_rank}.csv"
        is_new = not file.exists()
        with file.open("a", newline="") as rows:
            writer = csv.writer(rows)
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerow([trainer.global_step, f"{now - self._since:.4f}", *self._taken()])
        self._since = time.perf_counter()

    def _taken(self) -> tuple[str, int, int]:
        """Resident MiB, open files and threads."""
        with self._process.oneshot():
            rss = self._process.memory_info().rss / 2**20
            return f"{rss:.2f}", self._process.num_fds(), self._process.num_threads()
