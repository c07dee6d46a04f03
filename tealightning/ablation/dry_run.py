"""Dry run of an ablation: what would run, and how long it would take."""

import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tealightning.ablation.plan import Job, Plan
from tealightning.ablation.runner import Target, outcome_of, run_jobs
from tealightning.errors import UserError
from tealightning.reporting.tables import markdown_table

PILOT_STEPS = 2


def describe_plan(plan: Plan, seconds: Mapping[str, float], workers: int) -> str:
    """The variants with their settings, what is done and what is missing, and the time that it will take.

    Args:
        plan: The ablation.
        seconds: Of a run, by kind; empty if not known.
        workers: Runs at a time.
    """
    spec = plan.spec
    done = {job.folder: outcome_of(job).status for job in plan.all_jobs}
    rows = []
    for variant in plan.variants:
        jobs = [plan.jobs[variant.name, seed] for seed in spec.seeds]
        config = jobs[0].config
        rows.append(
            {
                "variant": variant.name + (" (reference)" if variant.base == spec.reference else ""),
                "estimator": config["model"]["init_args"]["estimator"]["class_path"].rpartition(".")[2],
                "m": config["rollout"]["group_size"],
                "prompts a step": config["data"]["init_args"]["batch_size"],
                "seeds": len(jobs),
                "finished": sum(done[job.folder] == "finished" for job in jobs),
                "failed": sum(done[job.folder] == "failed" for job in jobs),
            }
        )
    missing = [job for job in plan.all_jobs if done[job.folder] != "finished"]
    evaluation = spec.evaluation
    lines = [
        f"{spec.title or spec.name}: {len(plan.all_jobs)} runs, {len(plan.all_jobs) - len(missing)} finished, "
        f"{len(missing)} to do",
        f"Equal for all: {spec.equal_what} = {spec.equal[spec.equal_what]}. Evaluation: {max(evaluation.ns)} samples "
        f"of {evaluation.prompts or 'all'} validation and {_held_out(evaluation.held_out_prompts)} test prompts.",
        "",
        markdown_table(rows),
        "",
        _time(missing, seconds, workers),
    ]
    return "\n".join(lines)


def measure_pilot(plan: Plan, target: Target) -> dict[str, float]:
    """Expected seconds of a run by kind, from two training steps and two batches of evaluation of the reference, done
    for real in a temporary folder.

    Raises:
        UserError: if the pilot failed, with its reason.
    """
    spec = plan.spec
    name = next(variant.name for variant in plan.variants if variant.base == spec.reference)
    whole = plan.jobs[name, spec.seeds[0]]
    with tempfile.TemporaryDirectory() as folder:
        pilot = replace(whole, config=_short(whole.config), folder=Path(folder) / "pilot")
        outcome = run_jobs([pilot], target, workers=1, display=None)[pilot.folder]
    if outcome.status != "finished":
        raise UserError(f"the pilot of {name} failed: {outcome.error}")
    taken, config = outcome.record["seconds"], whole.config
    steps = _steps(config, outcome.record)
    batch = taken["evaluation"] / 2
    evaluation, held_out = _count(spec.evaluation.prompts), _count(spec.evaluation.held_out_prompts)
    per_evaluation = batch * evaluation / spec.evaluation.batch_size
    during = steps // spec.evaluation.every if spec.evaluation.every else 0
    last = batch * held_out / spec.evaluation.batch_size
    start = taken["setup"] + per_evaluation + last
    return {
        "start": start,
        "fit": start + steps * taken["training"] / PILOT_STEPS + max(0, during - 1) * per_evaluation,
    }


def _short(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["trainer"] |= {
        "max_steps": PILOT_STEPS, "limit_val_batches": 2, "limit_test_batches": 0, "val_check_interval": 1.0,
        "check_val_every_n_epoch": 10**9,
    }  # fmt: skip
    return config


def _steps(config: dict[str, Any], pilot: Mapping[str, Any]) -> int:
    """Optimizer steps that a run will make; budgets of tokens from what the pilot's steps used."""
    if config["trainer"]["max_steps"] > 0:
        return int(config["trainer"]["max_steps"])
    limits = next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(".Budget"))["init_args"]
    name, limit = next(iter(limits.items()))
    return math.ceil(limit / max(1.0, pilot[name] / PILOT_STEPS))


def _count(prompts: int | None) -> int:
    return 100 if prompts is None else prompts


def _held_out(prompts: int | None) -> str:
    return "all" if prompts is None else str(prompts)


def _time(missing: list[Job], seconds: Mapping[str, float], workers: int) -> str:
    if not missing:
        return "Nothing to do: only the report would be written."
    if not {job.kind for job in missing} <= seconds.keys():
        return "Time: not known, as no run has finished here (leave out --no-pilot to measure two steps)."
    total = sum(seconds[job.kind] for job in missing)
    each = ", ".join(f"{kind} {value:.0f} s" for kind, value in sorted(seconds.items()))
    return f"Time: about {math.ceil(total / workers / 60)} minutes with {workers} at a time (each: {each})."
