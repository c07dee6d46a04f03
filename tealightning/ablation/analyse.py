"""Turn finished runs into `results.json`: estimates with intervals, computed from the run folders alone."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tealightning.ablation.curves import checkpoints_of, equal_kl, histograms, training_curves
from tealightning.ablation.evaluations import (
    Estimator,
    EvaluationData,
    Runs,
    common_prompts,
    json_numbers,
    read_evaluations,
)
from tealightning.ablation.plan import Plan
from tealightning.ablation.results_view import BUDGETS
from tealightning.ablation.runner import Outcome
from tealightning.ablation.spec import spec_dict
from tealightning.errors import UserError
from tealightning.functional.best_of_n import holm, improvement, win_rate

SCHEMA_VERSION = 1
DIAGNOSTICS = ("kl", "kl_per_token", "distinct_1", "distinct_2", "self_similarity")


def analyse(plan: Plan, outcomes: Mapping[Path, Outcome], provenance: dict[str, str]) -> dict[str, Any]:
    """Everything that tables, plots and the report are made of; the schema is in docs/ablations-results.md.

    Args:
        plan: The ablation.
        outcomes: Of every run of the plan, by folder.
        provenance: What the results come from.

    Raises:
        UserError: if no variant has a finished run.
    """
    spec = plan.spec
    estimator = Estimator(confidence=spec.confidence, samples=spec.bootstrap_samples)
    main = _runs(plan, outcomes, "val")
    if not main:
        raise UserError("no run has finished: there is nothing to report.")
    held_out = _runs(plan, outcomes, "test")
    splits = {"val": _split_results(plan, main, estimator)} | (
        {"test": _split_results(plan, held_out, estimator)} if held_out else {}
    )
    ns = spec.evaluation.ns
    references = {variant.name: variant.reference for variant in plan.variants}
    checkpoints = {name: checkpoints_of(runs, ns, estimator) for name, runs in main.items()}
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
        "equal_kl": equal_kl(main, references, ns, spec.evaluation.equal_kls, estimator),
        "training": {name: training_curves(paths, estimator) for name, paths in folders.items()},
        "histograms": histograms({name: (r.starts, r.finals) for name, r in main.items()}),
    }


def _runs(plan: Plan, outcomes: Mapping[Path, Outcome], split: str) -> dict[str, Runs]:
    """Variant -> its finished runs whose starting policy was evaluated too."""
    finished: dict[str, Runs] = {}
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
            finished[variant.name] = runs
    return finished


def _split_results(plan: Plan, runs: dict[str, Runs], estimator: Estimator) -> dict[str, Any]:
    """One entry of `splits`."""
    ns = plan.spec.evaluation.ns
    keys = common_prompts([e for own in runs.values() for e in (*own.finals, *own.starts)])
    finals = {name: {s: e.on(keys) for s, e in zip(own.seeds, own.finals, strict=True)} for name, own in runs.items()}
    starts = {name: {s: e.on(keys) for s, e in zip(own.seeds, own.starts, strict=True)} for name, own in runs.items()}

    def policy(evaluations: Sequence[EvaluationData]) -> dict[str, Any]:
        return {
            "best_of_n": estimator.best_of_n(evaluations, ns),
            "gold_best_of_n": estimator.gold_best_of_n(evaluations, ns),
            "diagnostics": _diagnostics(evaluations, estimator),
        }

    references = {variant.name: variant.reference for variant in plan.variants}
    variants: dict[str, Any] = {}
    for name, own in finals.items():
        reference = references[name]
        measured = policy([*own.values()])
        variants[name] = {
            "seeds": runs[name].seeds,
            "reference": reference,
            "best_of_n": measured["best_of_n"],
            "gold_best_of_n": measured["gold_best_of_n"],
            "against_reference": _comparison(own, finals[reference], ns, estimator) if reference in finals else None,
            "against_start": _comparison(own, starts[name], ns, estimator),
            "diagnostics": measured["diagnostics"],
        }
    for what in ("against_reference", "against_start"):
        _adjust(variants, what, plan.spec.evaluation.headline_n)
    most_seeds = max(starts.values(), key=len)  # these starting policies stand for those of all
    return {
        "num_prompts": len(keys),
        "samples_per_prompt": int(next(iter(most_seeds.values())).rewards.shape[1]),
        "start": policy([*most_seeds.values()]),
        "variants": variants,
    }


def _comparison(
    own: Mapping[int, EvaluationData], other: Mapping[int, EvaluationData], ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]] | None:
    """`own - other`, paired by seed and prompt, a row for each n; None without a seed that both have."""
    pairs = [(evaluation, other[seed]) for seed, evaluation in own.items() if seed in other]
    if not pairs:
        return None
    a, b = (torch.stack([e.best_of_n(ns) for e in side]) for side in zip(*pairs, strict=True))
    differences = estimator.interval(a - b)
    improved = _probabilities(estimator(improvement(a, b)))
    wins = _probabilities(estimator(torch.stack([win_rate(x.rewards, y.rewards, ns) for x, y in pairs])))
    p_values = json_numbers(differences.p_value)
    return [
        {"n": n}
        | row
        | {"p_value": p_value, "p_adjusted": None, "probability_of_improvement": better, "win_rate": wins_at_n}
        for n, row, p_value, better, wins_at_n in zip(
            ns, estimator.rows(differences), p_values, improved, wins, strict=True
        )
    ]


def _probabilities(rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """Estimates whose bounds stay within 0 and 1: the interval of a mean does not know that it is a probability."""
    bounds = ("low", "high")
    return [row | {key: min(1.0, max(0.0, v)) for key in bounds if (v := row[key]) is not None} for row in rows]


def _adjust(variants: dict[str, Any], what: str, headline_n: int | None) -> None:
    """Holm's correction over variants at the headline n."""
    rows = [row for v in variants.values() for row in v[what] or [] if row["n"] == headline_n]
    known = [float("nan") if row["p_value"] is None else row["p_value"] for row in rows]
    p_values = torch.tensor(known, dtype=torch.float64)
    for row, adjusted in zip(rows, json_numbers(holm(p_values)) if rows else [], strict=True):
        row["p_adjusted"] = adjusted


def _diagnostics(evaluations: Sequence[EvaluationData], estimator: Estimator) -> dict[str, Any]:
    """Length, diversity, KL: means over prompts and seeds."""
    values = {
        "completion_length": [e.columns["lengths"].mean(dim=1) for e in evaluations],
        "truncated_fraction": [e.columns["truncated"].mean(dim=1) for e in evaluations],
        "reward_std": [_std(e.rewards) for e in evaluations],
        "unscorable_fraction": [e.rewards.isnan().double().mean(dim=1) for e in evaluations],
    }
    recorded = [name for name in DIAGNOSTICS if name in evaluations[0].columns]
    values |= {name: [e.columns[name] for e in evaluations] for name in recorded}
    estimates = {name: estimator(torch.stack(rows)[..., None])[0] for name, rows in values.items()}
    return {"kl": None, "kl_per_token": None} | estimates


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
        f"Intervals are {percent}, over seeds and prompts as crossed random factors, by a studentised bootstrap "
        f"({spec.bootstrap_samples} resamples): effects of prompts are resampled, those of seeds, too few for that, "
        "enter as normal, and a t quantile with the degrees of freedom of both widens the interval for their number. "
        "They tell how far other seeds and other prompts would move a figure.",
        "Differences are paired by seed and prompt. The probability of improvement is the share of (seed, prompt) "
        "pairs whose expected best-of-n is higher, ties counting half. The win rate is the probability that the best "
        "of n samples of one policy has a higher reward than the best of n of the other on the same prompt, ties "
        "split.",
        f"Adjusted p-values are Holm's over all variants at n = {spec.evaluation.headline_n} (family-wise error); "
        "intervals and the other p-values are not adjusted.",
        "The starting policy was evaluated once for each seed; differences to it are paired likewise.",
    ]
