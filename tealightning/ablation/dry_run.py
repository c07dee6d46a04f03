"""Dry run of an ablation: what would run, and how long it would take."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tealightning.ablation.plan import Plan
from tealightning.ablation.runner import Target, outcome_of, run_jobs
from tealightning.errors import UserError
from tealightning.reporting.tables import markdown_table

PILOT_STEPS = 2
PILOT_BATCHES = 2  # of evaluation
ASSUMED_PROMPTS = 100  # of a split that is evaluated whole


def describe_plan(plan: Plan, seconds: Mapping[str, float], workers: int) -> str:
    """The variants with their settings, what is done and what is missing, and the time that it will take, from the
    `seconds` of a run by kind where they are known."""
    spec, evaluation = plan.spec, plan.spec.evaluation
    status = {job.folder: outcome_of(job).status for job in plan.all_jobs}
    rows = []
    for variant in plan.variants:
        jobs = [plan.jobs[variant.name, seed] for seed in spec.seeds]
        config, states = jobs[0].config, [status[job.folder] for job in jobs]
        rows.append(
            {
                "variant": variant.name + (" (reference)" if variant.base == spec.reference else ""),
                "estimator": config["model"]["init_args"]["estimator"]["class_path"].rpartition(".")[2],
                "m": config["rollout"]["group_size"],
                "prompts a step": config["data"]["init_args"]["batch_size"],
                "seeds": len(jobs),
                "finished": states.count("finished"),
                "failed": states.count("failed"),
            }
        )
    missing = [job for job in plan.all_jobs if status[job.folder] != "finished"]
    held_out = "all" if evaluation.held_out_prompts is None else evaluation.held_out_prompts
    if not missing:
        time = "Nothing to do: only the report would be written."
    elif not {job.kind for job in missing} <= seconds.keys():
        time = "Time: not known, as no run has finished here (leave out --no-pilot to measure two steps)."
    else:
        minutes = math.ceil(sum(seconds[job.kind] for job in missing) / workers / 60)
        each = ", ".join(f"{kind} {value:.0f} s" for kind, value in sorted(seconds.items()))
        time = f"Time: about {minutes} minutes with {workers} at a time (each: {each})."
    return (
        f"{spec.title or spec.name}: {len(status)} runs, {len(status) - len(missing)} finished, {len(missing)} to do\n"
        f"Equal for all: {spec.equal_what} = {spec.equal[spec.equal_what]}. Evaluation: {max(evaluation.ns)} samples "
        f"of {evaluation.prompts or 'all'} validation and {held_out} test prompts.\n\n{markdown_table(rows)}\n\n{time}"
    )


def measure_pilot(plan: Plan, target: Target) -> dict[str, float]:
    """Expected seconds of a run by kind, from a few training steps and batches of evaluation of the reference, done for
    real in a temporary folder."""
    spec = plan.spec
    name = next(variant.name for variant in plan.variants if variant.base == spec.reference)
    job = plan.jobs[name, spec.seeds[0]]
    short = {
        "max_steps": PILOT_STEPS,
        "limit_val_batches": PILOT_BATCHES,
        "limit_test_batches": 0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 10**9,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = job.config | {"trainer": job.config["trainer"] | short}
        pilot = replace(job, config=config, folder=Path(folder) / "pilot")
        outcome = run_jobs([pilot], target, environments=[{}])[pilot.folder]
    if outcome.status != "finished":
        raise UserError(f"the pilot of {name} failed: {outcome.error}")
    taken, steps = outcome.record["seconds"], spec.equal[spec.equal_what]
    if spec.equal_what != "optimizer_steps":  # budgets of rollouts and tokens from what the pilot's steps used
        steps = math.ceil(steps / max(1.0, outcome.record[spec.equal_what] / PILOT_STEPS))
    batch = taken["evaluation"] / PILOT_BATCHES
    evaluation, held_out = (
        batch * (ASSUMED_PROMPTS if prompts is None else prompts) / spec.evaluation.batch_size
        for prompts in (spec.evaluation.prompts, spec.evaluation.held_out_prompts)
    )
    during = steps // spec.evaluation.every if spec.evaluation.every else 0
    start = taken["setup"] + evaluation + held_out
    return {"start": start, "fit": start + steps * taken["training"] / PILOT_STEPS + max(0, during - 1) * evaluation}
