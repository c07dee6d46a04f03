"""Curves of an ablation: best-of-n against KL and at equal KL, metrics against steps, rewards before and after."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.ablation.evaluations import (
    Estimator,
    EvaluationData,
    Runs,
    common_prompts,
    json_numbers,
    read_training,
)

LOGGED_METRICS = {  # of a run -> their names in results.json
    "rollout/reward_mean": "reward_mean",
    "rollout/reward_std": "reward_std",
    "rollout/completion_length_mean": "completion_length",
    "train/entropy": "entropy",
    "train/kl": "kl_per_token",
    "train/grad_norm": "grad_norm",
    "train/rollouts_skipped": "rollouts_skipped",
}
BINS = 60
NUM_KLS = 5

KLCurve = tuple[Tensor, Tensor]
"""KL [K] in nats a completion, rising, and best-of-n [K, Q, len(ns)], of one run."""


def checkpoints_of(runs: Runs, estimator: Estimator) -> list[dict[str, Any]]:
    """Best-of-n, gold and KL at every evaluation that all seeds have, the starting policy first."""
    rows = []
    # Seeds that stopped earlier by a token budget end the list.
    for evaluations in zip(*runs.all_points, strict=False):
        keys = common_prompts(evaluations)
        common = [evaluation.on(keys) for evaluation in evaluations]
        kl = [e.columns["kl"] for e in common if "kl" in e.columns]
        rows.append(
            {
                "step": sum(e.step for e in common) / len(common),
                "kl": estimator(torch.stack(kl)[..., None])[0] if len(kl) == len(common) else None,
                "best_of_n": estimator.best_of_n(common),
                "gold_best_of_n": estimator.gold_best_of_n(common),
            }
        )
    return rows


def training_curves(folders: Sequence[Path], estimator: Estimator) -> dict[str, Any]:
    """Metrics of the training steps that all seeds made, mean and interval over seeds."""
    runs = [read_training(folder) for folder in folders]
    steps = min((len(run.get("rollout/step", ())) for run in runs), default=0)
    if not steps:
        return {}
    parts = [match[1] for column in runs[0] if (match := re.fullmatch(r"rollout/reward_(.+)_mean", column))]
    of_parts = {f"rollout/reward_{part}_mean": f"reward_{part}" for part in parts} if len(parts) > 1 else {}
    result: dict[str, Any] = {"step": list(range(1, steps + 1))}
    for column, name in (LOGGED_METRICS | of_parts).items():  # of a weighted reward that has several parts also these
        if all(column in run and np.isfinite(run[column][:steps]).all() for run in runs):
            interval = estimator.interval(torch.tensor(np.stack([run[column][:steps] for run in runs]))[:, None, :])
            result[name] = {key: json_numbers(getattr(interval, key)) for key in ("mean", "low", "high")}
    return result


def histograms(runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Densities of all rewards before and after, on common bins."""

    def rewards(evaluations: Sequence[EvaluationData]) -> np.ndarray:
        values = torch.cat([e.rewards.flatten() for e in evaluations]).numpy()
        return values[~np.isnan(values)]

    start = rewards(next(iter(runs.values())).starts)
    finals = {name: rewards(own.finals) for name, own in runs.items()}
    low = min(float(np.quantile(v, 0.001)) for v in (start, *finals.values()))
    high = max(float(v.max()) for v in (start, *finals.values()))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)

    def density(values: np.ndarray) -> list[float]:
        counts, _ = np.histogram(values, edges)
        return (counts / (len(values) * (edges[1] - edges[0]))).tolist()

    variants = {name: density(values) for name, values in finals.items()}
    return {"edges": edges.tolist(), "start": density(start), "variants": variants}


def equal_kl(
    runs: Mapping[str, Runs], references: Mapping[str, str | None], kls: Sequence[float] | None, estimator: Estimator
) -> dict[str, Any] | None:
    """Best-of-n of every variant at the same KL to the starting policy: a run's curve, interpolated linearly in the
    square root of the KL between its evaluations, prompt by prompt. Rewards rise about like that root (Gao et al.
    2023); interpolating in the KL itself would understate the variants that move far between two evaluations.

    A variant has no value where one of its seeds never got so far. Differences to its reference are paired by seed and
    prompt.

    Args:
        kls: Where to compare; None = evenly up to the median over variants of the KL that all of a variant's seeds
            reached.

    Returns:
        `equal_kl` of results.json; None if a run has no KL, or nothing has moved.
    """
    evaluations = [e for own in runs.values() for points in own.all_points for e in points]
    if any("kl" not in e.columns for e in evaluations):
        return None
    keys = common_prompts(evaluations)
    curves: dict[str, dict[int, KLCurve]] = {}
    for name, own in runs.items():
        of_seeds = [kl_curve([e.on(keys) for e in points], estimator.ns) for points in own.all_points]
        curves[name] = dict(zip(own.seeds, of_seeds, strict=True))
    reach = {name: min(float(kl.max()) for kl, _ in of_variant.values()) for name, of_variant in curves.items()}
    if kls is None:
        top = float(np.median(list(reach.values())))
        kls = [float(f"{top * (i + 1) / NUM_KLS:.3g}") for i in range(NUM_KLS)] if top > 0 else []
    if not kls:
        return None

    def point(name: str, kl: float) -> dict[str, Any] | None:
        """A variant at a KL."""
        if kl > reach[name]:
            return None
        own, reference = curves[name], references.get(name) or ""
        other = curves[reference] if kl <= reach.get(reference, -1.0) else {}
        gaps = [at_kl(curve, kl) - at_kl(other[seed], kl) for seed, curve in own.items() if seed in other]
        return {
            "kl": kl,
            "best_of_n": estimator.curve(torch.stack([at_kl(curve, kl) for curve in own.values()])),
            "against_reference": estimator.differences(torch.stack(gaps)) if gaps else None,
        }

    variants = {name: [point(name, kl) for kl in kls] for name in curves}
    return {"kls": list(kls), "unit": "nats a completion", "variants": variants}


def kl_curve(evaluations: Sequence[EvaluationData], ns: Sequence[int]) -> KLCurve:
    """The curve of one run through its evaluations in the order of training.

    Where the KL falls back below an earlier one, the later evaluation is left out."""
    kls = [float(e.columns["kl"].mean()) for e in evaluations]
    rising = [i for i, kl in enumerate(kls) if kl > max(kls[:i], default=-1.0)]
    reached = torch.tensor([kls[i] for i in rising], dtype=torch.float64)
    return reached, torch.stack([evaluations[i].best_of_n(ns) for i in rising])


def at_kl(curve: KLCurve, kl: float) -> Tensor:
    """[Q, len(ns)] best-of-n at a KL that the curve reaches; below its first point that point's."""
    kls, values = curve
    if len(kls) == 1:  # a run that never moved
        return values[0]
    roots, root = kls.sqrt(), kl**0.5
    after = int(torch.searchsorted(roots, torch.tensor(root, dtype=roots.dtype)).clamp(1, len(kls) - 1))
    share = (root - float(roots[after - 1])) / float(roots[after] - roots[after - 1])
    return values[after - 1] + max(0.0, share) * (values[after] - values[after - 1])
