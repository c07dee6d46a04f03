"""From finished runs to `results.json`: estimates with intervals, and nothing that is not in the run folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tealightning.ablation.collect import EvaluationData, common_prompts, read_evaluations, rows_of
from tealightning.ablation.curves import checkpoints_of, equal_kl, histograms, training_curves
from tealightning.ablation.estimates import Estimator, numbers
from tealightning.ablation.plan import Plan
from tealightning.ablation.runner import Outcome
from tealightning.ablation.spec import spec_dict
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.comparisons import holm, improvement, win_rate
from tealightning.functional.selected import best_of_n_selected

SCHEMA_VERSION = 1
BUDGETS = ("optimizer_steps", "rollouts", "generated_tokens", "trained_tokens", "wall_seconds")
DIAGNOSTICS = ("kl", "kl_per_token", "distinct_1", "distinct_2", "self_similarity")


@dataclass(kw_only=True, slots=True)
class Runs:
    """The finished runs of one variant on one split, seed by seed."""

    seeds: list[int]
    finals: list[EvaluationData]
    starts: list[EvaluationData]  # of the same seed
    all_points: list[list[EvaluationData]]  # every evaluation during training, by step


def analyse(plan: Plan, outcomes: Mapping[Path, Outcome], provenance: dict[str, str]) -> dict[str, Any]:
    """Everything that tables, plots and the report are made of; the schema is in docs/ablations-results.md.

    Args:
        plan: The ablation.
        outcomes: Of every run of the plan, by folder.
        provenance: What the results come from.

    Raises:
        ValueError: if no variant has a finished run.
    """
    spec = plan.spec
    estimator = Estimator(confidence=spec.confidence, samples=spec.bootstrap_samples)
    main = _runs(plan, outcomes, "val")
    if not main:
        raise ValueError("no run has finished: there is nothing to report.")
    held_out = _runs(plan, outcomes, "test")
    splits = {"val": _split(plan, main, estimator)} | ({"test": _split(plan, held_out, estimator)} if held_out else {})
    ns = spec.evaluation.ns
    checkpoints = {name: checkpoints_of(runs.starts, runs.all_points, ns, estimator) for name, runs in main.items()}
    folders = {name: [plan.jobs[name, seed].folder for seed in runs.seeds] for name, runs in main.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "title": spec.title or spec.name,
        "description": spec.description,
        "provenance": provenance,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": spec_dict(spec),
        "confidence": spec.confidence,
        "bootstrap_samples": spec.bootstrap_samples,
        "statistics": _methods(plan),
        "ns": ns,
        "headline_n": spec.evaluation.headline_n,
        "reference": spec.reference,
        "equal": {"what": spec.equal_what, "amount": spec.equal[spec.equal_what]},
        "variants": list(main),
        "labels": {v.name: v.name.replace(v.base, spec.labels.get(v.base, v.base), 1) for v in plan.variants},
        "runs": _run_rows(plan, outcomes),
        "budgets": _budgets(plan, main, outcomes),
        "splits": splits,
        "checkpoints": checkpoints,
        "equal_kl": equal_kl(
            {n: (r.starts, r.all_points) for n, r in main.items()}, ns, spec.evaluation.equal_kls, estimator
        ),
        "training": {name: training_curves(paths, estimator) for name, paths in folders.items()},
        "histograms": histograms({name: (r.starts, r.finals) for name, r in main.items()}),
    }


def _runs(plan: Plan, outcomes: Mapping[Path, Outcome], split: str) -> dict[str, Runs]:
    """Variant -> its finished runs whose starting policy was evaluated too."""
    found: dict[str, Runs] = {}
    for variant in plan.variants:
        runs = Runs(seeds=[], finals=[], starts=[], all_points=[])
        for seed in plan.spec.seeds:
            job, start = plan.jobs[variant.name, seed], plan.starts[variant.name, seed]
            if any(outcomes[j.folder].status != "finished" for j in (job, start)):
                continue
            points, before = read_evaluations(job.folder, split), read_evaluations(start.folder, split)
            if points and before:
                runs.seeds.append(seed)
                runs.finals.append(points[-1])
                runs.starts.append(before[0])
                runs.all_points.append(points)
        if runs.seeds:
            found[variant.name] = runs
    return found


def _split(plan: Plan, runs: dict[str, Runs], estimator: Estimator) -> dict[str, Any]:
    """One SPLIT of the schema."""
    ns = plan.spec.evaluation.ns
    every = [e for r in runs.values() for e in (*r.finals, *r.starts)]
    keys = common_prompts(every)
    first = max(runs.values(), key=lambda r: len(r.seeds))  # its starting policies stand for those of all
    variants: dict[str, Any] = {}
    for variant in plan.variants:
        if variant.name not in runs:
            continue
        own = runs[variant.name]
        other = runs.get(variant.reference) if variant.reference else None
        variants[variant.name] = {
            "seeds": own.seeds,
            "reference": variant.reference,
            "best_of_n": _curve(own.finals, keys, ns, estimator),
            "gold_best_of_n": _gold_curve(own.finals, keys, ns, estimator),
            "against_reference": None if other is None else _against(own, other, keys, ns, estimator),
            "against_start": _comparison(own.finals, own.starts, keys, ns, estimator),
            "diagnostics": _diagnostics(own.finals, keys, estimator),
        }
    for what in ("against_reference", "against_start"):
        _adjust(variants, what, plan.spec.evaluation.headline_n)
    return {
        "num_prompts": len(keys),
        "samples_per_prompt": int(every[0].rewards.shape[1]),
        "start": {
            "best_of_n": _curve(first.starts, keys, ns, estimator),
            "gold_best_of_n": _gold_curve(first.starts, keys, ns, estimator),
            "diagnostics": _diagnostics(first.starts, keys, estimator),
        },
        "variants": variants,
    }


def _against(own: Runs, other: Runs, keys: Tensor, ns: Sequence[int], estimator: Estimator) -> Any:
    """Differences over the seeds that both have; None without any."""
    seeds = [seed for seed in own.seeds if seed in other.seeds]
    if not seeds:
        return None
    first = [own.finals[own.seeds.index(seed)] for seed in seeds]
    second = [other.finals[other.seeds.index(seed)] for seed in seeds]
    return _comparison(first, second, keys, ns, estimator)


def _comparison(
    first: Sequence[EvaluationData],
    second: Sequence[EvaluationData],
    keys: Tensor,
    ns: Sequence[int],
    estimator: Estimator,
) -> list[dict[str, Any]]:
    """`first - second`, paired by seed and prompt, a row for each n."""
    a, b = _values(first, keys, ns), _values(second, keys, ns)
    differences = estimator.interval(a - b)
    improved = _probabilities(estimator(improvement(a, b)))
    pairs = zip(first, second, strict=True)
    won = torch.stack([win_rate(_rewards(x, keys), _rewards(y, keys), ns) for x, y in pairs])
    wins = _probabilities(estimator(won))
    rows = estimator.rows(differences)
    return [
        {"n": n}
        | rows[i]
        | {
            "p_value": numbers(differences.p_value)[i],
            "p_adjusted": None,
            "probability_of_improvement": improved[i],
            "win_rate": wins[i],
        }
        for i, n in enumerate(ns)
    ]


def _probabilities(rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """Estimates whose bounds stay within 0 and 1: the interval of a mean does not know that it is a probability."""
    for row in rows:
        for name in ("low", "high"):
            bound = row[name]
            row[name] = None if bound is None else min(1.0, max(0.0, bound))
    return rows


def _adjust(variants: dict[str, Any], what: str, headline_n: int | None) -> None:
    """Holm's correction over variants at the headline n."""
    rows = [row for v in variants.values() for row in v[what] or [] if row["n"] == headline_n]
    known = [float("nan") if row["p_value"] is None else row["p_value"] for row in rows]
    p_values = torch.tensor(known, dtype=torch.float64)
    for row, adjusted in zip(rows, numbers(holm(p_values)) if rows else [], strict=True):
        row["p_adjusted"] = adjusted


def _rewards(evaluation: EvaluationData, keys: Tensor) -> Tensor:
    return evaluation.rewards[rows_of(evaluation, keys)]


def _values(evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int]) -> Tensor:
    """[S, Q, len(ns)] best-of-n."""
    return torch.stack([_best(_rewards(e, keys), ns) for e in evaluations])


def _best(rewards: Tensor, ns: Sequence[int]) -> Tensor:
    return best_of_n(rewards, ns, ~rewards.isnan())


def _curve(
    evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]]:
    return estimator.curve(_values(evaluations, keys, ns), ns)


def _gold_curve(
    evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]] | None:
    """Gold reward of the sample that the proxy picks among n."""
    if any("gold" not in e.columns for e in evaluations):
        return None
    values = [
        best_of_n_selected(_rewards(e, keys), e.columns["gold"][rows_of(e, keys)], ns, ~_rewards(e, keys).isnan())
        for e in evaluations
    ]
    return estimator.curve(torch.stack(values), ns)


def _diagnostics(evaluations: Sequence[EvaluationData], keys: Tensor, estimator: Estimator) -> dict[str, Any]:
    """Length, diversity, KL: means over prompts and seeds."""
    rewards = [_rewards(e, keys) for e in evaluations]

    def column(name: str) -> list[Tensor]:
        return [e.columns[name][rows_of(e, keys)] for e in evaluations]

    values = {
        "completion_length": [lengths.mean(dim=1) for lengths in column("lengths")],
        "truncated_fraction": [truncated.mean(dim=1) for truncated in column("truncated")],
        "reward_std": [_std(r) for r in rewards],
        "unscorable_fraction": [r.isnan().double().mean(dim=1) for r in rewards],
    } | {name: column(name) for name in DIAGNOSTICS if name in evaluations[0].columns}
    found = {name: estimator(torch.stack(rows)[..., None])[0] for name, rows in values.items()}
    return {"kl": None, "kl_per_token": None} | found


def _std(rewards: Tensor) -> Tensor:
    """[Q] standard deviation (ddof 1) of the scored samples."""
    count = (~rewards.isnan()).sum(dim=1)
    deviations = rewards - rewards.nanmean(dim=1, keepdim=True)
    return (deviations.square().nansum(dim=1) / (count - 1).clamp(min=1)).sqrt()


def _run_rows(plan: Plan, outcomes: Mapping[Path, Outcome]) -> list[dict[str, Any]]:
    rows = []
    for job in plan.all_jobs:
        outcome = outcomes[job.folder]
        record = outcome.record
        rows.append(
            {
                "variant": job.variant if job.kind == "fit" else "start",
                "seed": job.seed,
                "status": outcome.status,
                "error": outcome.error,
                "folder": str(job.folder),
                "hash": job.hash,
                "commit": record.get("commit"),
                "versions": record.get("versions", {}),
            }
            | {name: record.get(name) for name in BUDGETS}
        )
    return rows


def _budgets(plan: Plan, runs: dict[str, Runs], outcomes: Mapping[Path, Outcome]) -> dict[str, Any]:
    """Means over the finished seeds."""
    result = {}
    for name, own in runs.items():
        records = [outcomes[plan.jobs[name, seed].folder].record for seed in own.seeds]
        result[name] = {key: sum(r[key] for r in records) / len(records) for key in BUDGETS}
    return result


def _methods(plan: Plan) -> list[str]:
    """How the numbers were made, in sentences."""
    spec = plan.spec
    percent = f"{100 * spec.confidence:g}%"
    return [
        f"Every variant was trained with the seeds {', '.join(map(str, spec.seeds))}; a seed decides sampling and the "
        "order of the prompts, and is the same for all variants.",
        "All policies were evaluated on the same prompts with the same sampling seeds. Best-of-n is the unbiased mean "
        "of the maximum over all subsets of n of a prompt's samples; n = 1 is the mean reward.",
        f"Intervals are {percent} and come from a hierarchical bootstrap that resamples seeds and prompts as crossed "
        f"factors ({spec.bootstrap_samples} resamples), scaled to the unbiased variance of the mean and widened for "
        "the small number of seeds. They tell how far other seeds and other prompts would move a figure.",
        "Differences are paired by seed and prompt. The probability of improvement is the share of (seed, prompt) "
        "pairs whose expected best-of-n is higher, ties counting half. The win rate is the probability that the best "
        "of n samples of one policy has a higher reward than the best of n of the other on the same prompt, ties "
        "split.",
        f"Adjusted p-values are Holm's over all variants at n = {spec.evaluation.headline_n} (family-wise error); "
        "intervals and the other p-values are not adjusted.",
        "The starting policy was evaluated once for each seed; differences to it are paired likewise.",
    ]
