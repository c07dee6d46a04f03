"""Progress display of an ablation: a bar for all runs and one for each that is running."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tealightning.ablation.plan import Job

LINE_SECONDS = 60.0


class Display:
    """On a terminal bars, elsewhere a line for each run that ends and one a minute.

    Args:
        jobs: The runs that are to be done.
        workers: How many run at a time.
        seconds: Expected seconds of a run, by kind; replaced by what the runs take.
    """

    def __init__(self, jobs: Sequence[Job], workers: int, seconds: Mapping[str, float] | None = None) -> None:
        self._workers = workers
        self._expected = dict(seconds or {})
        self._taken: dict[str, list[float]] = {}
        self._left = Counter(job.kind for job in jobs)
        self._failed = 0
        self._last_line = time.monotonic()
        console = Console(file=sys.stdout)
        columns = ("{task.description}", BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
        )
        self._all = self._bars.add_task("all runs", total=len(jobs), note="")
        self._running: dict[Any, Any] = {}

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, job: Job) -> None:
        """A run has begun."""
        self._running[job.folder] = self._bars.add_task(f"  {job.title}", total=None, note="starting")

    def progress(self, job: Job, message: dict[str, Any]) -> None:
        """A run has sent how far it is."""
        if "done" in message:
            reward = message.get("reward")
            note = message["phase"] + (f", reward {reward:.3f}" if reward is not None else "")
            task = self._running[job.folder]
            self._bars.update(task, completed=message["done"], total=message["total"], note=note)

    def retrying(self, job: Job, error: str) -> None:
        """A run failed and is tried again."""
        self._bars.remove_task(self._running.pop(job.folder))
        self._print(f"{job.title} failed and is tried again: {error}")

    def ended(self, job: Job, status: str, error: str | None, seconds: float | None) -> None:
        """A run has ended, one way or another."""
        self._bars.remove_task(self._running.pop(job.folder))
        self._left[job.kind] -= 1
        if status == "finished" and seconds is not None:
            self._taken.setdefault(job.kind, []).append(seconds)
        self._failed += status != "finished"
        remaining = self._remaining()
        note = f"{self._failed} failed" if self._failed else ""
        self._bars.update(self._all, advance=1, note=note + remaining)
        outcome = f"{seconds:.0f} s" if status == "finished" and seconds is not None else f"{status.upper()}: {error}"
        overall = self._bars.tasks[0]
        self._print(f"[{overall.completed:.0f}/{overall.total:.0f}] {job.title}: {outcome}{remaining}")

    def tick(self) -> None:
        """Called about every second: without a terminal, a line a minute."""
        _, *running = self._bars.tasks
        if self._bars.disable and running and time.monotonic() - self._last_line > LINE_SECONDS:
            states = [
                f"{t.description.strip()}: {t.fields['note']} {t.completed:.0f}/{t.total or '?'}" for t in running
            ]
            self._print("  " + "; ".join(states))

    def _remaining(self) -> str:
        means = self._expected | {kind: sum(all_) / len(all_) for kind, all_ in self._taken.items()}
        seconds = sum(count * means.get(kind, 0.0) for kind, count in self._left.items()) / self._workers
        return f", about {max(1, round(seconds / 60))} min left" if seconds > 0 else ""

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self._bars.disable:
            print(line, flush=True)
        else:
            self._bars.console.print(line, markup=False, highlight=False)
