"""Read run folders into arrays, a row per prompt, and estimate means with intervals from them."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.callbacks.evaluation_record import FOLDER
from tealightning.functional.best_of_n import best_of_n, best_of_n_selected
from tealightning.functional.statistics import Interval, crossed_interval

Estimates = list[dict[str, Any]]
"""An entry for each column, or for each `n`: `mean`, `low`, `high` and `se`, None where they are not known."""


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
        return replace(self, keys=keys, rewards=self.rewards[rows], columns=columns)

    def best_of_n(self, ns: Sequence[int]) -> Tensor:
        """[Q, len(ns)] best-of-n of every prompt."""
        return best_of_n(self.rewards, ns, ~self.rewards.isnan())


Runs = dict[int, list[EvaluationData]]
"""Of a variant on a split: seed -> the evaluation of the starting policy, then those of the finished run by step."""


def read_evaluations(folder: Path, split: str) -> list[EvaluationData]:
    """All evaluations of a run on a split ("val" or "test"), by step; the files of several ranks are joined."""
    parts: dict[int, list[dict[str, Tensor]]] = {}
    for file in sorted((folder / FOLDER).glob(f"{split}_*.npz")):
        if match := re.fullmatch(r"[a-z]+_(\d+)(\.rank\d+)?\.npz", file.name):
            with np.load(file) as arrays:
                part = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            parts.setdefault(int(match[1]), []).append(part)
    evaluations = []
    for step, of_ranks in sorted(parts.items()):
        columns = {name: torch.cat([part[name] for part in of_ranks]) for name in of_ranks[0]}
        # Ranks may repeat prompts to be of equal length.
        keys, first = np.unique(columns.pop("keys").numpy(), return_index=True)
        columns = {name: values[first].double() for name, values in columns.items()}
        rewards = columns.pop("rewards")
        evaluations.append(EvaluationData(step=step, keys=torch.from_numpy(keys), rewards=rewards, columns=columns))
    return evaluations


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """Means over seeds and prompts with intervals, as the plain numbers of results.json."""

    ns: Sequence[int]
    confidence: float
    samples: int  # of the bootstrap

    def interval(self, values: Tensor) -> Interval:
        """Of [S, Q, C] values."""
        return crossed_interval(values, confidence=self.confidence, samples=self.samples)

    def __call__(self, values: Tensor, *, p_values: bool = False) -> Estimates:
        """C estimates of [S, Q, C] values."""
        interval = self.interval(values)
        columns = {"mean": interval.mean, "low": interval.low, "high": interval.high, "se": interval.standard_error}
        columns |= {"p_value": interval.p_value} if p_values else {}
        lists = [json_numbers(column) for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def curve(self, values: Tensor, *, p_values: bool = False) -> Estimates:
        """An estimate for each n of [S, Q, len(ns)] values."""
        return [{"n": n} | row for n, row in zip(self.ns, self(values, p_values=p_values), strict=True)]

    def best_of_n(self, evaluations: Sequence[EvaluationData]) -> Estimates:
        """The best-of-n curve of one evaluation of each seed."""
        return self.curve(torch.stack([e.best_of_n(self.ns) for e in evaluations]))

    def gold_best_of_n(self, evaluations: Sequence[EvaluationData]) -> Estimates | None:
        """The same of the gold reward of the sample that the reward picks; None unless all evaluations have it."""
        if any("gold" not in e.columns for e in evaluations):
            return None
        golds = [best_of_n_selected(e.rewards, e.columns["gold"], self.ns, ~e.rewards.isnan()) for e in evaluations]
        return self.curve(torch.stack(golds))


def json_numbers(values: Tensor) -> list[float | None]:
    """Convert to floats; NaN and inf become None (JSON has no NaN)."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]
