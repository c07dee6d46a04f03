"""Clocks, and what a measurement ran on."""

import functools
import logging
import os
import platform
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from tealightning.reporting.provenance import commit

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_chosen = "wall"


def use_clock(name: str) -> None:
    """What all timings are taken with: `wall`, or `cpu`, the seconds that this process computed, which a busy machine
    disturbs less and which hide whatever waits or runs on another device."""
    global _chosen
    _chosen = name


def now() -> float:
    """Seconds on the chosen clock."""
    return CLOCKS[_chosen]()


class PhaseClock:
    """Adds up the seconds spent in methods, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, method: str, phase: str) -> None:
        """From now on count `owner.method(...)` under `phase`; the class keeps its method."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[phase] += now() - started

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far, by phase; counting starts anew."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def quiet() -> None:
    """Nothing but the table and the JSON line."""
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def seconds_of(call: Callable[[], Any]) -> float:
    """Time of one call."""
    started = now()
    call()
    return now() - started


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of each key over rows; a missing key counts as 0."""
    keys = {key: None for row in rows for key in row}
    return {key: median(row.get(key, 0.0) for row in rows) for key in keys}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratios of values measured in turn, so that slow spells of the machine cancel."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": round(median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)}


_COMMIT = commit()  # of the code that runs: a later commit changes nothing in this process


def environment() -> dict[str, Any]:
    """Versions, threads and commit."""
    import transformers

    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _COMMIT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "clock": _chosen,
        "load": round(os.getloadavg()[0], 2),  # above the number of cores, wall-clock timings are disturbed
    }
