"""What changes during training: best-of-n against KL, metrics against steps; and rewards before and after."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.ablation.collect import EvaluationData, common_prompts, read_training, rows_of
from tealightning.ablation.estimates import Estimator, numbers
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.selected import best_of_n_selected

TRAINING_METRICS = {
    "rollout/reward_mean": "reward_mean",
    "rollout/reward_std": "reward_std",
    "rollout/completion_length_mean": "completion_length",
    "train/entropy": "entropy",
    "train/kl": "kl_per_token",
    "train/grad_norm": "grad_norm",
    "train/rollouts_skipped": "rollouts_skipped",
}
NUM_KLS = 5
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


def equal_kl(
    runs: Mapping[str, tuple[Sequence[EvaluationData], Points]],
    ns: Sequence[int],
    kls: Sequence[float] | None,
    estimator: Estimator,
) -> dict[str, Any] | None:
    """Best-of-n of every variant at the same KL to the starting policy: a run's curve, interpolated linearly in the
    square root of the KL between its evaluations, prompt by prompt. Rewards rise about like that root (Gao et al.
    2023); interpolating in the KL itself would understate the variants that move far between two evaluations.

    A variant has no value where one of its seeds never got so far.

    Without `kls` they are spread evenly up to the median over variants of the KL that all of a variant's seeds reached.
    """
    curves = {name: [_kl_curve(s, p, ns) for s, p in zip(*both, strict=True)] for name, both in runs.items()}
    if any(curve is None for all_ in curves.values() for curve in all_):
        return None
    known = {name: [curve for curve in all_ if curve is not None] for name, all_ in curves.items()}
    reach = {name: min(float(kl.max()) for kl, _ in all_) for name, all_ in known.items()}
    if kls is None:
        top = float(np.median(list(reach.values())))
        kls = [float(f"{top * (i + 1) / NUM_KLS:.3g}") for i in range(NUM_KLS)] if top > 0 else []
    if not kls:
        return None
    variants: dict[str, Any] = {}
    for name, all_ in known.items():
        variants[name] = [
            {"kl": kl, "best_of_n": estimator.curve(torch.stack([_at(curve, kl) for curve in all_]), ns)}
            if kl <= reach[name]
            else None
            for kl in kls
        ]
    return {"kls": list(kls), "unit": "nats a completion", "variants": variants}


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


def _kl_curve(
    start: EvaluationData, points: Sequence[EvaluationData], ns: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """KL [K], never falling, and best-of-n [K, Q, len(ns)] of one run; None without KL.

    Where the KL falls back below an earlier one the later point is left out: the curve ends at its furthest point."""
    column = [start, *points]
    if any("kl" not in e.columns for e in column):
        return None
    keys = common_prompts(column)
    kls = [float(e.columns["kl"][rows_of(e, keys)].mean()) for e in column]
    rising = [i for i, kl in enumerate(kls) if kl > max(kls[:i], default=-1.0)]
    rewards = [column[i].rewards[rows_of(column[i], keys)] for i in rising]
    return torch.tensor([kls[i] for i in rising], dtype=torch.float64), torch.stack(
        [best_of_n(r, ns, ~r.isnan()) for r in rewards]
    )


def _at(curve: tuple[Tensor, Tensor], kl: float) -> Tensor:
    """[Q, len(ns)] best-of-n at a KL above 0 within the curve."""
    kls, values = curve
    if len(kls) == 1:  # a run that never moved
        return values[0]
    roots, root = kls.sqrt(), kl**0.5
    after = int(torch.searchsorted(roots, torch.tensor(root, dtype=roots.dtype)).clamp(1, len(kls) - 1))
    share = (root - float(roots[after - 1])) / float(roots[after] - roots[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])
