"""Turn finished runs into `results.json`: estimates with intervals, computed from the run folders alone."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tealightning.ablation.collect import Runs, read_evaluations
from tealightning.ablation.curves import checkpoints_of, histograms, training_curves
from tealightning.ablation.equal_kl import equal_kl
from tealightning.ablation.estimates import Estimator
from tealightning.ablation.plan import Plan
from tealightning.ablation.runner import Outcome
from tealightning.ablation.spec import spec_dict
from tealightning.ablation.splits import split_results
from tealightning.errors import UserError

SCHEMA_VERSION = 1
BUDGETS = ("optimizer_steps", "rollouts", "generated_tokens", "trained_tokens", "wall_seconds")


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
        raise UserError("no run has finished: there is nothing to report.")
    held_out = _runs(plan, outcomes, "test")
    splits = {"val": split_results(plan, main, estimator)} | (
        {"test": split_results(plan, held_out, estimator)} if held_out else {}
    )
    ns = spec.evaluation.ns
    references = {variant.name: variant.reference for variant in plan.variants}
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
        "equal_kl": equal_kl(main, references, ns, spec.evaluation.equal_kls, estimator),
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
