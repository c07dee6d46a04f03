"""Progress display of an ablation: a bar for all runs and a line for each that is running."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tealightning.ablation.plan import Job

LINE_SECONDS = 60.0


class Display:
    """On a terminal bars, elsewhere a line for each run that ends and one a minute.

    Args:
        total: Runs that are to be done.
        workers: How many run at a time.
        seconds: Expected seconds of a run, by kind; corrected by what the runs take.
    """

    def __init__(self, total: int, workers: int, seconds: dict[str, float] | None = None) -> None:
        self.total = total
        self.workers = workers
        self.expected = dict(seconds or {})
        self.taken: dict[str, list[float]] = {}
        self.left: dict[str, int] = {}
        self.ended_count = 0
        self.failed_count = 0
        self._console = Console(file=sys.stdout)
        self._bars: Progress | None = None
        self._tasks: dict[Any, Any] = {}
        self._overall: Any = None
        self._status: dict[Any, str] = {}
        self._last_line = time.monotonic()

    def expect(self, jobs: Sequence[Job]) -> None:
        """Which kinds of runs are to come, for the time that is left."""
        for job in jobs:
            self.left[job.kind] = self.left.get(job.kind, 0) + 1

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bars.start()
            self._overall = self._bars.add_task("all runs", total=self.total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, job: Job) -> None:
        """A run has begun."""
        self._status[job.folder] = f"{job.title}: starting"
        if self._bars is not None:
            self._tasks[job.folder] = self._bars.add_task(f"  {job.title}", total=None, note="starting")

    def progress(self, job: Job, message: dict[str, Any]) -> None:
        """A run tells how far it is."""
        if "done" not in message:
            return
        reward = message.get("reward")
        note = message["phase"] + (f", reward {reward:.3f}" if reward is not None else "")
        self._status[job.folder] = f"{job.title}: {note} {message['done']}/{message['total'] or '?'}"
        if self._bars is not None:
            self._bars.update(self._tasks[job.folder], completed=message["done"], total=message["total"], note=note)

    def retrying(self, job: Job, error: str) -> None:
        """A run failed and is tried again."""
        self._remove(job)
        self._print(f"{job.title} failed and is tried again: {error}")

    def ended(self, job: Job, status: str, error: str | None, seconds: float | None) -> None:
        """A run has ended, one way or another."""
        self._remove(job)
        self.ended_count += 1
        self.left[job.kind] = max(0, self.left.get(job.kind, 1) - 1)
        if status == "finished" and seconds is not None:
            self.taken.setdefault(job.kind, []).append(seconds)
        self.failed_count += status != "finished"
        outcome = f"{seconds:.0f} s" if status == "finished" and seconds is not None else f"{status.upper()}: {error}"
        self._print(f"[{self.ended_count}/{self.total}] {job.title}: {outcome}{self._remaining()}")
        if self._bars is not None:
            note = f"{self.failed_count} failed" if self.failed_count else ""
            self._bars.update(self._overall, completed=self.ended_count, note=note + self._remaining())

    def tick(self) -> None:
        """Called about every second: without a terminal, a line a minute."""
        if self._bars is None and time.monotonic() - self._last_line > LINE_SECONDS and self._status:
            self._print("  " + "; ".join(self._status.values()))

    def _remaining(self) -> str:
        means = self.expected | {kind: sum(all_) / len(all_) for kind, all_ in self.taken.items()}
        seconds = sum(count * means.get(kind, 0.0) for kind, count in self.left.items()) / self.workers
        return f", about {max(1, round(seconds / 60))} min left" if seconds > 0 else ""

    def _remove(self, job: Job) -> None:
        self._status.pop(job.folder, None)
        if self._bars is not None and (task := self._tasks.pop(job.folder, None)) is not None:
            self._bars.remove_task(task)

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)
