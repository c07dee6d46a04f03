"""Turn finished runs into `results.json`: estimates with intervals, computed from the run folders alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.ablation import evaluations as recorded
from tealightning.ablation.evaluations import Estimates, Estimator, EvaluationData, Runs
from tealightning.ablation.plan import Plan
from tealightning.ablation.runner import Outcome
from tealightning.ablation.tables import BUDGETS
from tealightning.errors import UserError
from tealightning.functional.best_of_n import holm, improvement, win_rate

SCHEMA_VERSION = 1
BINS = 60
NUM_KLS = 5
DIAGNOSTICS = ("kl", "kl_per_token", "distinct_1", "distinct_2", "self_similarity")
LOGGED_METRICS = {  # of a run -> their names in results.json
    "rollout/reward_mean": "reward_mean",
    "rollout/reward_std": "reward_std",
    "rollout/completion_length_mean": "completion_length",
    "train/entropy": "entropy",
    "train/kl": "kl_per_token",
    "train/grad_norm": "grad_norm",
    "train/rollouts_skipped": "rollouts_skipped",
}

KLCurve = tuple[Tensor, Tensor]
"""KL [K] in nats a completion, rising, and best-of-n [K, Q, len(ns)], of one run."""


def analyse(plan: Plan, outcomes: Mapping[Path, Outcome], provenance: dict[str, str]) -> dict[str, Any]:
    """Everything that tables, plots and the report are made of; the schema is in docs/ablations-results.md."""
    spec, ns = plan.spec, plan.spec.evaluation.ns
    estimator = Estimator(ns=ns, confidence=spec.confidence, samples=spec.bootstrap_samples)
    main, held_out = (_runs(plan, outcomes, split) for split in ("val", "test"))
    if not main:
        raise UserError("no run has finished: there is nothing to report.")
    evaluated = {"val": main} | ({"test": held_out} if held_out else {})
    references = {variant.name: variant.reference for variant in plan.variants}
    n = spec.evaluation.headline_n
    splits = {name: _split_results(runs, references, n, estimator) for name, runs in evaluated.items()}
    folders = {name: [plan.jobs[name, seed].folder for seed in runs] for name, runs in main.items()}
    records = {name: [outcomes[folder].record for folder in own] for name, own in folders.items()}
    runs = []
    for job in plan.all_jobs:
        outcome = outcomes[job.folder]
        run = {"variant": job.variant if job.kind == "fit" else "start", "seed": job.seed}
        run |= {"status": outcome.status, "error": outcome.error, "folder": str(job.folder), "hash": job.hash}
        run |= {"commit": outcome.record.get("commit"), "versions": outcome.record.get("versions", {})}
        runs.append(run | {name: outcome.record.get(name) for name in BUDGETS})
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "title": spec.title or spec.name,
        "description": spec.description,
        "provenance": provenance,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": asdict(spec),
        "confidence": spec.confidence,
        "bootstrap_samples": spec.bootstrap_samples,
        "statistics": _methods(plan),
        "ns": ns,
        "headline_n": spec.evaluation.headline_n,
        "reference": spec.reference,
        "equal": {"what": spec.equal_what, "amount": spec.equal[spec.equal_what]},
        "variants": list(main),
        "labels": {v.name: v.name.replace(v.base, spec.labels.get(v.base, v.base), 1) for v in plan.variants},
        "runs": runs,
        "budgets": {
            name: {key: sum(record[key] for record in own) / len(own) for key in BUDGETS}
            for name, own in records.items()
        },
        "splits": splits,
        "checkpoints": {name: checkpoints_of(runs, estimator) for name, runs in main.items()},
        "equal_kl": equal_kl(main, references, spec.evaluation.equal_kls, estimator),
        "training": {name: training_curves(paths, estimator) for name, paths in folders.items()},
        "histograms": histograms(main),
    }


def _runs(plan: Plan, outcomes: Mapping[Path, Outcome], split: str) -> dict[str, Runs]:
    """Variant -> its finished runs whose starting policy was evaluated too."""
    finished: dict[str, Runs] = {}
    for name, seed in plan.jobs:
        folders = [jobs[name, seed].folder for jobs in (plan.starts, plan.jobs)]
        if all(outcomes[folder].status == "finished" for folder in folders):
            before, points = (recorded.read_evaluations(folder, split) for folder in folders)
            if before and points:
                finished.setdefault(name, {})[seed] = [before[0], *points]
    return finished


def _split_results(
    runs: dict[str, Runs], references: Mapping[str, str | None], headline_n: int | None, estimator: Estimator
) -> dict[str, Any]:
    """One entry of `splits`."""
    keys = recorded.common_prompts(
        [e for own in runs.values() for points in own.values() for e in (points[0], points[-1])]
    )
    starts, finals = (
        {name: {seed: points[place].on(keys) for seed, points in own.items()} for name, own in runs.items()}
        for place in (0, -1)
    )

    def policy(by_seed: Mapping[int, EvaluationData]) -> dict[str, Any]:
        evaluations = [*by_seed.values()]
        return {
            "best_of_n": estimator.best_of_n(evaluations),
            "gold_best_of_n": estimator.gold_best_of_n(evaluations),
            "diagnostics": _diagnostics(evaluations, estimator),
        }

    variants: dict[str, Any] = {}
    for name, own in finals.items():
        reference, measured = references[name], policy(own)
        variants[name] = {
            "seeds": list(own),
            "reference": reference,
            "best_of_n": measured["best_of_n"],
            "gold_best_of_n": measured["gold_best_of_n"],
            "against_reference": _comparison(own, finals[reference], estimator) if reference in finals else None,
            "against_start": _comparison(own, starts[name], estimator),
            "diagnostics": measured["diagnostics"],
        }
    for what in ("against_reference", "against_start"):  # Holm's correction over variants at the headline n
        rows = [row for v in variants.values() for row in v[what] or () if row["n"] == headline_n]
        p_values = [float("nan") if row["p_value"] is None else row["p_value"] for row in rows]
        if rows:
            adjusted = recorded.json_numbers(holm(torch.tensor(p_values, dtype=torch.float64)))
            for row, p_adjusted in zip(rows, adjusted, strict=True):
                row["p_adjusted"] = p_adjusted
    most_seeds = max(starts.values(), key=len)  # these starting policies stand for those of all
    return {
        "num_prompts": len(keys),
        "samples_per_prompt": int(next(iter(most_seeds.values())).rewards.shape[1]),
        "start": policy(most_seeds),
        "variants": variants,
    }


def _comparison(
    own: Mapping[int, EvaluationData], other: Mapping[int, EvaluationData], estimator: Estimator
) -> Estimates | None:
    """`own - other`, paired by seed and prompt, a row for each n; None without a seed that both have."""
    pairs, ns = [(evaluation, other[seed]) for seed, evaluation in own.items() if seed in other], estimator.ns
    if not pairs:
        return None
    a, b = (torch.stack([e.best_of_n(ns) for e in side]) for side in zip(*pairs, strict=True))
    improved = estimator(improvement(a, b))
    wins = estimator(torch.stack([win_rate(x.rewards, y.rewards, ns) for x, y in pairs]))
    for row in (*improved, *wins):  # the interval of a mean does not know that it is a probability
        row |= {key: min(1.0, max(0.0, row[key])) for key in ("low", "high") if row[key] is not None}
    return [
        row | {"p_adjusted": None, "probability_of_improvement": better, "win_rate": wins_at_n}
        for row, better, wins_at_n in zip(estimator.curve(a - b, p_values=True), improved, wins, strict=True)
    ]


def _diagnostics(evaluations: Sequence[EvaluationData], estimator: Estimator) -> dict[str, Any]:
    """Length, diversity, KL: means over prompts and seeds."""
    scored = [e.rewards for e in evaluations]
    squares = [(rewards - rewards.nanmean(dim=1, keepdim=True)).square().nansum(dim=1) for rewards in scored]
    counts = [(~rewards.isnan()).sum(dim=1) for rewards in scored]
    values = {
        "completion_length": [e.columns["lengths"].mean(dim=1) for e in evaluations],
        "truncated_fraction": [e.columns["truncated"].mean(dim=1) for e in evaluations],
        # Of the scored samples, with ddof 1.
        "reward_std": [(sum_ / (count - 1).clamp(min=1)).sqrt() for sum_, count in zip(squares, counts, strict=True)],
        "unscorable_fraction": [rewards.isnan().double().mean(dim=1) for rewards in scored],
    }
    measured = [name for name in DIAGNOSTICS if name in evaluations[0].columns]
    values |= {name: [e.columns[name] for e in evaluations] for name in measured}
    estimates = {name: estimator(torch.stack(rows)[..., None])[0] for name, rows in values.items()}
    return {"kl": None, "kl_per_token": None} | estimates


def checkpoints_of(runs: Runs, estimator: Estimator) -> list[dict[str, Any]]:
    """Best-of-n, gold and KL at every evaluation that all seeds have, the starting policy first."""
    rows = []
    # Seeds that stopped earlier by a token budget end the list.
    for evaluations in zip(*runs.values(), strict=False):
        keys = recorded.common_prompts(evaluations)
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
    runs = [recorded.read_training(folder) for folder in folders]
    steps = min((len(run.get("rollout/step", ())) for run in runs), default=0)
    if not steps:
        return {}
    parts = [match[1] for column in runs[0] if (match := re.fullmatch(r"rollout/reward_(.+)_mean", column))]
    of_parts = {f"rollout/reward_{part}_mean": f"reward_{part}" for part in parts} if len(parts) > 1 else {}
    result: dict[str, Any] = {"step": list(range(1, steps + 1))}
    for column, name in (LOGGED_METRICS | of_parts).items():  # of a weighted reward that has several parts also these
        if all(column in run and np.isfinite(run[column][:steps]).all() for run in runs):
            interval = estimator.interval(torch.tensor(np.stack([run[column][:steps] for run in runs]))[:, None, :])
            result[name] = {key: recorded.json_numbers(getattr(interval, key)) for key in ("mean", "low", "high")}
    return result


def histograms(runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Densities of all rewards before and after, on common bins."""

    def rewards(evaluations: Sequence[EvaluationData]) -> np.ndarray:
        values = torch.cat([e.rewards.flatten() for e in evaluations]).numpy()
        return values[~np.isnan(values)]

    start = rewards([points[0] for points in next(iter(runs.values())).values()])
    finals = {name: rewards([points[-1] for points in own.values()]) for name, own in runs.items()}
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
    prompt. Without `kls` they are taken evenly up to the median over variants of the KL that all of a variant's seeds
    reached. None if a run has no KL, or nothing has moved.
    """
    evaluations = [e for own in runs.values() for points in own.values() for e in points]
    if any("kl" not in e.columns for e in evaluations):
        return None
    keys = recorded.common_prompts(evaluations)
    curves: dict[str, dict[int, KLCurve]] = {}
    for name, own in runs.items():
        curves[name] = {seed: kl_curve([e.on(keys) for e in points], estimator.ns) for seed, points in own.items()}
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
            "against_reference": estimator.curve(torch.stack(gaps), p_values=True) if gaps else None,
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


def _methods(plan: Plan) -> list[str]:
    """How the numbers were made, in sentences."""
    spec = plan.spec
    return [
        f"Every variant was trained with the seeds {', '.join(map(str, spec.seeds))}; a seed decides sampling and the "
        "order of the prompts, and is the same for all variants.",
        "All policies were evaluated on the same prompts with the same sampling seeds. Best-of-n is the unbiased mean "
        "of the maximum over all subsets of n of a prompt's samples; n = 1 is the mean reward.",
        f"Intervals are {100 * spec.confidence:g}%, over seeds and prompts as crossed random factors, by a studentised "
        f"bootstrap ({spec.bootstrap_samples} resamples): effects of prompts are resampled, those of seeds, too few "
        "for that, enter as normal, and a t quantile with the degrees of freedom of both widens the interval for their "
        "number. They tell how far other seeds and other prompts would move a figure.",
        "Differences are paired by seed and prompt. The probability of improvement is the share of (seed, prompt) "
        "pairs whose expected best-of-n is higher, ties counting half. The win rate is the probability that the best "
        "of n samples of one policy has a higher reward than the best of n of the other on the same prompt, ties "
        "split.",
        f"Adjusted p-values are Holm's over all variants at n = {spec.evaluation.headline_n} (family-wise error); "
        "intervals and the other p-values are not adjusted.",
        "The starting policy was evaluated once for each seed; differences to it are paired likewise.",
    ]
