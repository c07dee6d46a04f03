"""Command `compare`: head-to-head ablations."""

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tealightning.cli.commands import playground
from tealightning.cli.console import quiet_startup
from tealightning.errors import UserError

if TYPE_CHECKING:
    from tealightning.ablation.plan import Job, Plan
    from tealightning.ablation.spec import AblationSpec
    from tealightning.ablation.worker import Send


DESCRIPTION = """\
Run what is missing of an ablation - every variant with every seed - and write tables, plots and a report. Runs that
have finished are never repeated: stop at any time, and the same command goes on. A run that failed is reported, keeps
the others going, and is tried again by the next call.
"""
WORKERS = "runs at a time; default: one a GPU, or one a CPU core that is free"


def compare(args: Sequence[str]) -> None:
    """`tealightning compare ARGS`; exits with status 1 if a run failed, after everything else was done."""
    options = _parser().parse_args(args)
    from tealightning.ablation.runner import outcome_of, unfinished_jobs
    from tealightning.ablation.spec import load_spec

    spec = _restricted(load_spec(options.config), options)
    plan = plan_of(spec, on_disk=not options.report_only)
    if options.dry_run:
        _show_plan(plan, options)
        return
    with ablation_lock(spec.folder):
        missing = [] if options.report_only else unfinished_jobs(plan.all_jobs)
        outcomes = {job.folder: outcome_of(job) for job in plan.all_jobs}
        if missing:
            outcomes |= run_missing(plan, missing, options.workers)
        elif not options.report_only:
            print(f"All {len(plan.all_jobs)} runs have finished already.")
        _report(plan, outcomes, args, options.wandb)
    failed = sum(outcomes[job.folder].status != "finished" for job in plan.all_jobs)
    if failed:
        print(f"{failed} of {len(plan.all_jobs)} runs are not in these results; the same command tries them again.")
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tealightning compare", description=DESCRIPTION)
    add, flag = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("-c", "--config", type=Path, required=True, metavar="SPEC", help="the ablation, a YAML file")
    flag("--dry-run", help="check everything and print the plan; nothing is run")
    flag("--no-pilot", help="with --dry-run: do not measure how long a run takes")
    flag("--report-only", help="rebuild results and report from the run folders")
    add("--workers", type=int, metavar="K", help=WORKERS)
    add("--variants", nargs="+", metavar="NAME", help="only these variants of the spec")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="these seeds instead of the spec's")
    add("--out", metavar="DIR", help="folder of runs and results instead of the spec's")
    add("--wandb", metavar="PROJECT", help="upload tables, plots and the report to this project as well")
    return parser


def _restricted(spec: "AblationSpec", options: argparse.Namespace) -> "AblationSpec":
    """The spec with what the options change."""
    from dataclasses import replace

    from tealightning.ablation.spec import placeholders

    changes = {name: value for name in ("seeds", "out") if (value := getattr(options, name)) is not None}
    if options.variants is not None:
        if unknown := [name for name in options.variants if name not in spec.variants]:
            raise UserError(f"--variants: the spec has no {unknown[0]!r}; it has {', '.join(spec.variants)}.")
        wanted = {*options.variants, spec.reference}
        changes["variants"] = {name: settings for name, settings in spec.variants.items() if name in wanted}
        used = placeholders([spec.settings, *changes["variants"].values()])
        changes["grid"] = {axis: values for axis, values in spec.grid.items() if axis in used}
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}.")
    return replace(spec, **changes)


def plan_of(spec: "AblationSpec", *, on_disk: bool = True) -> "Plan":
    """Every run of the ablation, checked; with `on_disk` the worlds that are missing are built and all inputs looked
    at."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from tealightning.ablation.plan import expand, make_plan

    for settings in spec.playgrounds if on_disk else ():
        words: list[str] = []
        for name, value in settings.items():
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        playground(words)
    resolver = functools.partial(resolve, on_disk=on_disk)
    if (gold := spec.evaluation.gold) is not None:  # built once, as a run would
        configs = [part for path in spec.base for part in ("-c", path)]
        reward = gold if isinstance(gold, str) else json.dumps(gold)
        try:
            resolver([*configs, "--rollout.engine=transformers_engine", f"--rollout.reward={reward}"])
        except UserError as error:
            raise UserError(str(error).replace("rollout.reward", "evaluation.gold")) from error
    with Progress(TextColumn("Checking variants"), BarColumn(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task("", total=len(expand(spec)))
        return make_plan(spec, resolver, lambda variant: bar.advance(task))


def resolve(args: Sequence[str], *, on_disk: bool = False) -> dict[str, Any]:
    """The configuration that `tealightning fit ARGS` amounts to, with everything built once to see that it can be;
    with `on_disk` policy, prompts and reward are looked at, too."""
    import yaml

    from tealightning.cli.preflight import check_inputs, check_together
    from tealightning.cli.training import build_training

    logging.disable(logging.WARNING)  # Lightning tells what it found and set
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            cli = build_training("fit", args)
    finally:
        logging.disable(logging.NOTSET)
    check_together(cli)
    if on_disk:
        check_inputs(cli)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]


def run_missing(plan: "Plan", missing: Sequence["Job"], workers: int | None) -> dict[Path, Any]:
    """Run the jobs with a display of their progress."""
    from tealightning.ablation import runner

    environments = _environments(workers)[: len(missing)]
    print(
        f"{len(missing)} of {len(plan.all_jobs)} runs to do, {len(environments)} at a time, "
        f"in {plan.spec.folder}/runs. Stop at any time: the same command goes on.",
        flush=True,
    )
    try:
        return runner.run_jobs(
            missing,
            run_job,
            environments=environments,
            retries=plan.spec.retries,
            preload=runner.modules_to_preload(missing),
        )
    except KeyboardInterrupt:
        print("\nStopped. Finished runs are kept; the same command goes on.", flush=True)
        raise SystemExit(130) from None


def _environments(workers: int | None) -> list[dict[str, str]]:
    """Environment variables of each worker, with those that have to be set in this process set.

    The runs' processes are forked from one that is started with this process's environment: thread counts are read when
    torch is imported. Runs leave without tidying up, and Python's resource tracker would warn of it behind the results.
    """
    from tealightning.ablation.runner import environments_of

    environments = environments_of(workers)
    if threads := environments[0].get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = threads
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    return environments


def run_job(job: "Job", send: "Send") -> None:
    """One run, in its own process."""
    from tealightning.ablation.worker import execute
    from tealightning.cli.training import build_training

    quiet_startup()
    execute(job, lambda args: build_training("fit", args), send)


def _report(plan: "Plan", outcomes: dict[Path, Any], args: Sequence[str], wandb_project: str | None) -> None:
    """Write results and report, and print what did not finish, the main table and where the files are."""
    from tealightning.ablation.analyse import analyse
    from tealightning.ablation.report import upload, write_outputs
    from tealightning.ablation.worker import write_json
    from tealightning.reporting.provenance import provenance

    folder = plan.spec.folder
    for job in plan.all_jobs:
        if (outcome := outcomes[job.folder]).status != "finished":
            print(f"{outcome.status}: {job.title}: {outcome.error or 'not run yet'}")
    results = analyse(plan, outcomes, provenance(["compare", *args], seed=plan.spec.seeds[0]))
    write_json(folder / "results.json", results)
    files = [folder / "results.json", *write_outputs(results, folder)]
    main_table = (folder / "table.md").read_text(encoding="utf-8").split("\n## ")[1]
    print(f"\n{main_table.strip()}\n")
    print("\n".join(str(file) for file in files if file.suffix != ".svg"))
    if wandb_project:
        print(upload(results, folder, project=wandb_project))


def _show_plan(plan: "Plan", options: argparse.Namespace) -> None:
    """What would run, and an estimate of the time."""
    from tealightning.ablation.dry_run import describe_plan, measure_pilot

    environments = _environments(options.workers)
    seconds = _seconds_of(plan)
    if not {"fit", "start"} <= seconds.keys() and not options.no_pilot:
        print("Measuring two training steps and a batch of evaluation ...", flush=True)
        seconds = measure_pilot(plan, run_job) | seconds
    print(describe_plan(plan, seconds, len(environments)))


def _seconds_of(plan: "Plan") -> dict[str, float]:
    """Mean wall time of the finished runs of each kind."""
    from tealightning.ablation.runner import outcome_of

    outcomes = ((job.kind, outcome_of(job)) for job in plan.all_jobs)
    finished = [(kind, outcome.record["wall_seconds"]) for kind, outcome in outcomes if outcome.status == "finished"]
    return {kind: fmean(seconds for of, seconds in finished if of == kind) for kind, _ in finished}


def ablation_lock(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """Lock of the ablation's folder: two commands would write the same results."""
    from tealightning.reliability.locks import locked

    return locked(folder, f"another `tealightning` command is at work in {shlex.quote(str(folder))}.")
