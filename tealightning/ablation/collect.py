"""Read run folders into arrays: one row per prompt, the same prompts in the same order for every run."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tealightning.callbacks.evaluation_record import FOLDER

_FILE = re.compile(r"(val|test)_(\d+)(?:\.rank\d+)?\.npz")


@dataclass(kw_only=True, slots=True)
class EvaluationData:
    """One evaluation of one run, prompts sorted by key."""

    step: int  # optimizer steps
    keys: Tensor  # [Q] int64
    rewards: Tensor  # [Q, M] float64, NaN = could not be scored
    columns: dict[str, Tensor]  # [Q] or [Q, M] float64: gold, lengths, truncated, kl, ...


@dataclass(kw_only=True, slots=True)
class Runs:
    """The finished runs of one variant on one split, seed by seed."""

    seeds: list[int]
    finals: list[EvaluationData]
    starts: list[EvaluationData]  # of the same seed
    all_points: list[list[EvaluationData]]  # every evaluation during training, by step


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


def rows_of(evaluation: EvaluationData, keys: Tensor) -> Tensor:
    """[Q] indices of the rows of `keys`, which must all be there."""
    return torch.searchsorted(evaluation.keys, keys)


def rewards_of(evaluation: EvaluationData, keys: Tensor) -> Tensor:
    """[Q, M] rewards of the prompts `keys`, which must all be there."""
    return evaluation.rewards[rows_of(evaluation, keys)]


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
