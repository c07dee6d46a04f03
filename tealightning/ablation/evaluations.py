"""Read run folders into arrays, a row per prompt, and estimate means with intervals from them."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.callbacks.evaluation_record import FOLDER
from tealightning.functional.best_of_n import best_of_n, best_of_n_selected
from tealightning.functional.statistics import Interval, crossed_interval

_FILE = re.compile(r"(val|test)_(\d+)(?:\.rank\d+)?\.npz")


@dataclass(kw_only=True, slots=True)
class EvaluationData:
    """One evaluation of one run, prompts sorted by key."""

    step: int  # optimizer steps
    keys: Tensor  # [Q] int64
    rewards: Tensor  # [Q, M] float64, NaN = could not be scored
    columns: dict[str, Tensor]  # [Q] or [Q, M] float64: gold, lengths, truncated, kl, ...

    def on(self, keys: Tensor) -> "EvaluationData":
        """The same for the prompts `keys` alone, which must all be there."""
        rows = torch.searchsorted(self.keys, keys)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return EvaluationData(step=self.step, keys=keys, rewards=self.rewards[rows], columns=columns)

    def best_of_n(self, ns: Sequence[int]) -> Tensor:
        """[Q, len(ns)] best-of-n of every prompt."""
        return best_of_n(self.rewards, ns, ~self.rewards.isnan())

    def gold_best_of_n(self, ns: Sequence[int]) -> Tensor:
        """[Q, len(ns)] gold reward of the sample that the reward picks among n."""
        return best_of_n_selected(self.rewards, self.columns["gold"], ns, ~self.rewards.isnan())


@dataclass(kw_only=True, slots=True)
class Runs:
    """The finished runs of one variant on one split, seed by seed."""

    seeds: list[int]
    finals: list[EvaluationData]
    starts: list[EvaluationData]  # of the same seed
    all_points: list[list[EvaluationData]]  # every evaluation during training, by step

    @property
    def with_starts(self) -> list[list[EvaluationData]]:
        """Every evaluation of each seed, that of its starting policy first."""
        return [[start, *during] for start, during in zip(self.starts, self.all_points, strict=True)]


def read_evaluations(folder: Path, split: str) -> list[EvaluationData]:
    """All evaluations of a run on a split ("val" or "test"), by step; the files of several ranks are joined."""
    files: dict[int, list[Path]] = {}
    for file in sorted((folder / FOLDER).glob(f"{split}_*.npz")):
        if match := _FILE.fullmatch(file.name):
            files.setdefault(int(match[2]), []).append(file)
    return [_joined(step, paths) for step, paths in sorted(files.items())]


def read_training(folder: Path) -> dict[str, np.ndarray]:
    """The training metrics of a run, [steps] each, NaN where a step has none; empty without any.

    They are in `metrics.csv`, and of a run that was resumed before that in `metrics_<i>.csv`; of a step that is in
    several files, which is one that was repeated after a checkpoint, the last one counts.
    """
    rows: dict[float, dict[str, str]] = {}
    for file in [*sorted(folder.glob("metrics_*.csv")), folder / "metrics.csv"]:
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as text:
                rows |= {float(row["rollout/step"]): row for row in csv.DictReader(text) if row.get("rollout/step")}
    ordered = [rows[step] for step in sorted(rows)]
    names = dict.fromkeys(name for row in ordered for name in row if name and name.startswith(("train/", "rollout/")))
    return {name: np.array([float(row.get(name) or "nan") for row in ordered]) for name in names}


def common_prompts(evaluations: Sequence[EvaluationData]) -> Tensor:
    """[Q] the keys that all evaluations have, sorted."""
    keys = evaluations[0].keys
    for evaluation in evaluations[1:]:
        keys = keys[torch.isin(keys, evaluation.keys)]
    return keys


def _joined(step: int, files: Sequence[Path]) -> EvaluationData:
    parts = []
    for file in files:
        with np.load(file) as arrays:
            parts.append({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    keys, first = np.unique(merged["keys"].numpy(), return_index=True)  # ranks may repeat prompts to be of equal length
    columns = {name: values[first].double() for name, values in merged.items() if name not in ("keys", "rewards")}
    return EvaluationData(
        step=step, keys=torch.from_numpy(keys), rewards=merged["rewards"][first].double(), columns=columns
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """Means over seeds and prompts with intervals, as the plain numbers of results.json."""

    confidence: float
    samples: int  # of the bootstrap

    def interval(self, values: Tensor) -> Interval:
        """Of [S, Q, C] values."""
        return crossed_interval(values, confidence=self.confidence, samples=self.samples)

    def __call__(self, values: Tensor) -> list[dict[str, float | None]]:
        """C estimates of [S, Q, C] values."""
        return self.rows(self.interval(values))

    def curve(self, values: Tensor, ns: Sequence[int]) -> list[dict[str, Any]]:
        """An estimate for each n of [S, Q, len(ns)] values."""
        return [{"n": n} | row for n, row in zip(ns, self(values), strict=True)]

    def best_of_n(self, evaluations: Sequence[EvaluationData], ns: Sequence[int]) -> list[dict[str, Any]]:
        """The best-of-n curve of one evaluation of each seed."""
        return self.curve(torch.stack([e.best_of_n(ns) for e in evaluations]), ns)

    def gold_best_of_n(self, evaluations: Sequence[EvaluationData], ns: Sequence[int]) -> list[dict[str, Any]] | None:
        """The same of the gold reward; None unless all evaluations have it."""
        if any("gold" not in e.columns for e in evaluations):
            return None
        return self.curve(torch.stack([e.gold_best_of_n(ns) for e in evaluations]), ns)

    def rows(self, interval: Interval) -> list[dict[str, float | None]]:
        """The interval's columns, one dict each."""
        keys = {"mean": "mean", "low": "low", "high": "high", "se": "standard_error"}
        lists = {key: json_numbers(getattr(interval, name)) for key, name in keys.items()}
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def json_numbers(values: Tensor) -> list[float | None]:
    """Convert to floats; NaN and inf become None (JSON has no NaN)."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]
