"""Turn finished runs into `results.json`: estimates with intervals, computed from the run folders alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tealightning.ablation.curves import checkpoints_of, equal_kl, histograms, training_curves
from tealightning.ablation.evaluations import (
    Estimates,
    Estimator,
    EvaluationData,
    Runs,
    common_prompts,
    json_numbers,
    read_evaluations,
)
from tealightning.ablation.plan import Plan
from tealightning.ablation.runner import Outcome
from tealightning.ablation.tables import BUDGETS
from tealightning.errors import UserError
from tealightning.functional.best_of_n import holm, improvement, win_rate

SCHEMA_VERSION = 1
DIAGNOSTICS = ("kl", "kl_per_token", "distinct_1", "distinct_2", "self_similarity")


def analyse(plan: Plan, outcomes: Mapping[Path, Outcome], provenance: dict[str, str]) -> dict[str, Any]:
    """Everything that tables, plots and the report are made of; the schema is in docs/ablations-results.md.

    Raises:
        UserError: if no variant has a finished run.
    """
    spec, ns = plan.spec, plan.spec.evaluation.ns
    estimator = Estimator(ns=ns, confidence=spec.confidence, samples=spec.bootstrap_samples)
    main, held_out = (_runs(plan, outcomes, split) for split in ("val", "test"))
    if not main:
        raise UserError("no run has finished: there is nothing to report.")
    evaluated = {"val": main} | ({"test": held_out} if held_out else {})
    splits = {name: _split_results(plan, runs, estimator) for name, runs in evaluated.items()}
    folders = {name: [plan.jobs[name, seed].folder for seed in runs.seeds] for name, runs in main.items()}
    records = {name: [outcomes[folder].record for folder in own] for name, own in folders.items()}
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
        "runs": _run_rows(plan, outcomes),
        "budgets": {
            name: {key: sum(record[key] for record in own) / len(own) for key in BUDGETS}
            for name, own in records.items()
        },
        "splits": splits,
        "checkpoints": {name: checkpoints_of(runs, estimator) for name, runs in main.items()},
        "equal_kl": equal_kl(main, _references(plan), spec.evaluation.equal_kls, estimator),
        "training": {name: training_curves(paths, estimator) for name, paths in folders.items()},
        "histograms": histograms(main),
    }


def _references(plan: Plan) -> dict[str, str | None]:
    return {variant.name: variant.reference for variant in plan.variants}


def _runs(plan: Plan, outcomes: Mapping[Path, Outcome], split: str) -> dict[str, Runs]:
    """Variant -> its finished runs whose starting policy was evaluated too."""
    finished: dict[str, Runs] = {}
    for variant in plan.variants:
        runs = Runs(seeds=[], finals=[], starts=[], all_points=[])
        for seed in plan.spec.seeds:
            folders = [jobs[variant.name, seed].folder for jobs in (plan.jobs, plan.starts)]
            if any(outcomes[folder].status != "finished" for folder in folders):
                continue
            points, before = (read_evaluations(folder, split) for folder in folders)
            if points and before:
                runs.seeds.append(seed)
                runs.finals.append(points[-1])
                runs.starts.append(before[0])
                runs.all_points.append([before[0], *points])
        if runs.seeds:
            finished[variant.name] = runs
    return finished


def _split_results(plan: Plan, runs: dict[str, Runs], estimator: Estimator) -> dict[str, Any]:
    """One entry of `splits`."""
    keys = common_prompts([e for own in runs.values() for e in (*own.finals, *own.starts)])
    finals = {name: {s: e.on(keys) for s, e in zip(own.seeds, own.finals, strict=True)} for name, own in runs.items()}
    starts = {name: {s: e.on(keys) for s, e in zip(own.seeds, own.starts, strict=True)} for name, own in runs.items()}

    def policy(by_seed: Mapping[int, EvaluationData]) -> dict[str, Any]:
        evaluations = [*by_seed.values()]
        return {
            "best_of_n": estimator.best_of_n(evaluations),
            "gold_best_of_n": estimator.gold_best_of_n(evaluations),
            "diagnostics": _diagnostics(evaluations, estimator),
        }

    variants: dict[str, Any] = {}
    for name, own in finals.items():
        reference, measured = _references(plan)[name], policy(own)
        variants[name] = {
            "seeds": runs[name].seeds,
            "reference": reference,
            "best_of_n": measured["best_of_n"],
            "gold_best_of_n": measured["gold_best_of_n"],
            "against_reference": _comparison(own, finals[reference], estimator) if reference in finals else None,
            "against_start": _comparison(own, starts[name], estimator),
            "diagnostics": measured["diagnostics"],
        }
    for what in ("against_reference", "against_start"):
        _adjust(variants, what, plan.spec.evaluation.headline_n)
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
        for row, better, wins_at_n in zip(estimator.differences(a - b), improved, wins, strict=True)
    ]


def _adjust(variants: dict[str, Any], what: str, headline_n: int | None) -> None:
    """Holm's correction over variants at the headline n."""
    rows = [row for v in variants.values() for row in v[what] or [] if row["n"] == headline_n]
    known = [float("nan") if row["p_value"] is None else row["p_value"] for row in rows]
    p_values = torch.tensor(known, dtype=torch.float64)
    for row, adjusted in zip(rows, json_numbers(holm(p_values)) if rows else [], strict=True):
        row["p_adjusted"] = adjusted


def _diagnostics(evaluations: Sequence[EvaluationData], estimator: Estimator) -> dict[str, Any]:
    """Length, diversity, KL: means over prompts and seeds."""
    rewards = [e.rewards for e in evaluations]
    counts = [(~r.isnan()).sum(dim=1) for r in rewards]
    squares = [(r - r.nanmean(dim=1, keepdim=True)).square().nansum(dim=1) for r in rewards]
    values = {
        "completion_length": [e.columns["lengths"].mean(dim=1) for e in evaluations],
        "truncated_fraction": [e.columns["truncated"].mean(dim=1) for e in evaluations],
        # Of the scored samples, with ddof 1.
        "reward_std": [(s / (n - 1).clamp(min=1)).sqrt() for s, n in zip(squares, counts, strict=True)],
        "unscorable_fraction": [r.isnan().double().mean(dim=1) for r in rewards],
    }
    recorded = [name for name in DIAGNOSTICS if name in evaluations[0].columns]
    values |= {name: [e.columns[name] for e in evaluations] for name in recorded}
    estimates = {name: estimator(torch.stack(rows)[..., None])[0] for name, rows in values.items()}
    return {"kl": None, "kl_per_token": None} | estimates


def _run_rows(plan: Plan, outcomes: Mapping[Path, Outcome]) -> list[dict[str, Any]]:
    rows = []
    for job in plan.all_jobs:
        outcome = outcomes[job.folder]
        rows.append(
            {
                "variant": job.variant if job.kind == "fit" else "start",
                "seed": job.seed,
                "status": outcome.status,
                "error": outcome.error,
                "folder": str(job.folder),
                "hash": job.hash,
                "commit": outcome.record.get("commit"),
                "versions": outcome.record.get("versions", {}),
                **{name: outcome.record.get(name) for name in BUDGETS},
            }
        )
    return rows


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
