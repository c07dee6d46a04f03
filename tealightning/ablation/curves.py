"""Training curves of an ablation: best-of-n against KL, metrics against steps, rewards before and after."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tealightning.ablation.collect import EvaluationData, common_prompts, read_training, rows_of
from tealightning.ablation.estimates import Estimator, numbers
from tealightning.functional.best_of_n import best_of_n, best_of_n_selected

TRAINING_METRICS = {
    "rollout/reward_mean": "reward_mean",
    "rollout/reward_std": "reward_std",
    "rollout/completion_length_mean": "completion_length",
    "train/entropy": "entropy",
    "train/kl": "kl_per_token",
    "train/grad_norm": "grad_norm",
    "train/rollouts_skipped": "rollouts_skipped",
}
BINS = 60

Points = Sequence[Sequence[EvaluationData]]  # [seeds][evaluations]


def checkpoints_of(
    starts: Sequence[EvaluationData], points: Points, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]]:
    """Best-of-n, gold and KL at every evaluation that all seeds have, the starting policy first."""
    columns = [[start, *during] for start, during in zip(starts, points, strict=True)]
    rows = []
    for column in zip(*columns, strict=False):  # seeds that stopped earlier by a token budget end the list
        keys = common_prompts(column)
        rewards = [e.rewards[rows_of(e, keys)] for e in column]
        gold = None
        if all("gold" in e.columns for e in column):
            golds = [e.columns["gold"][rows_of(e, keys)] for e in column]
            selected = [best_of_n_selected(r, g, ns, ~r.isnan()) for r, g in zip(rewards, golds, strict=True)]
            gold = estimator.curve(torch.stack(selected), ns)
        kls = [e.columns.get("kl") for e in column]
        kl = [k[rows_of(e, keys)] for e, k in zip(column, kls, strict=True) if k is not None]
        rows.append(
            {
                "step": sum(e.step for e in column) / len(column),
                "kl": estimator(torch.stack(kl)[..., None])[0] if len(kl) == len(column) else None,
                "best_of_n": estimator.curve(torch.stack([best_of_n(r, ns, ~r.isnan()) for r in rewards]), ns),
                "gold_best_of_n": gold,
            }
        )
    return rows


def training_curves(folders: Sequence[Path], estimator: Estimator) -> dict[str, Any]:
    """Metrics of the training steps that all seeds made, mean and interval over seeds."""
    runs = [read_training(folder) for folder in folders]
    steps = min((len(run.get("rollout/step", ())) for run in runs), default=0)
    if not steps:
        return {}
    result: dict[str, Any] = {"step": list(range(1, steps + 1))}
    for column, name in (TRAINING_METRICS | _components(runs[0])).items():
        if all(column in run and np.isfinite(run[column][:steps]).all() for run in runs):
            interval = estimator.interval(torch.tensor(np.stack([run[column][:steps] for run in runs]))[:, None, :])
            result[name] = {
                "mean": numbers(interval.mean),
                "low": numbers(interval.low),
                "high": numbers(interval.high),
            }
    return result


def _components(run: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Columns of the parts of a weighted reward, where there are several."""
    names = [match[1] for column in run if (match := re.fullmatch(r"rollout/reward_(.+)_mean", column))]
    return {f"rollout/reward_{name}_mean": f"reward_{name}" for name in names} if len(names) > 1 else {}


def histograms(runs: Mapping[str, tuple[Sequence[EvaluationData], Sequence[EvaluationData]]]) -> dict[str, Any]:
    """Densities of all rewards before and after, on common bins."""

    def rewards(evaluations: Sequence[EvaluationData]) -> np.ndarray:
        values = torch.cat([e.rewards.flatten() for e in evaluations]).numpy()
        return values[~np.isnan(values)]

    start = rewards(next(iter(runs.values()))[0])
    finals = {name: rewards(final) for name, (_, final) in runs.items()}
    low = min(float(np.quantile(v, 0.001)) for v in (start, *finals.values()))
    high = max(float(v.max()) for v in (start, *finals.values()))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)

    def density(values: np.ndarray) -> list[float]:
        counts, _ = np.histogram(values, edges)
        return [float(x) for x in counts / (len(values) * (edges[1] - edges[0]))]

    return {
        "edges": [float(edge) for edge in edges],
        "start": density(start),
        "variants": {name: density(values) for name, values in finals.items()},
    }
