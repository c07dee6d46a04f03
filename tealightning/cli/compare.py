"""Command `compare`: head-to-head ablations."""

import argparse
import contextlib
import io
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tealightning.errors import UserError

if TYPE_CHECKING:
    from tealightning.ablation.plan import Job, Plan, Resolve
    from tealightning.ablation.spec import AblationSpec
    from tealightning.ablation.worker import Send
    from tealightning.cli.training import TrainingCLI


DESCRIPTION = """\
Run what is missing of an ablation - every variant with every seed - and write tables, plots and a report.

Runs that have finished are never repeated: stop at any time, and the same command goes on. A run that failed is
reported, keeps the others going, and is tried again by the next call.
"""

EPILOG = """\
examples:
  tealightning compare -c configs/ablations/prose.yaml --dry-run      what would run, and for how long
  tealightning compare -c configs/ablations/prose.yaml                run it, or go on with it
  tealightning compare -c configs/ablations/prose.yaml --report-only  results and report again, nothing run
  tealightning compare -c configs/ablations/prose.yaml --seeds 0 1 --variants grpo tea
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="tealightning compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("-c", "--config", type=Path, required=True, metavar="SPEC", help="the ablation, a YAML file")
    result.add_argument("--dry-run", action="store_true", help="check everything and print the plan; nothing is run")
    result.add_argument("--no-pilot", action="store_true", help="with --dry-run: do not measure how long a run takes")
    result.add_argument("--report-only", action="store_true", help="rebuild results and report from the run folders")
    result.add_argument(
        "--workers", type=int, metavar="K", help="runs at a time; default: one a GPU, or one a CPU core"
    )
    result.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants of the spec")
    result.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these seeds instead of the spec's")
    result.add_argument("--out", metavar="DIR", help="folder of runs and results instead of the spec's")
    result.add_argument(
        "--wandb", metavar="PROJECT", help="upload tables, plots and the report to this project as well"
    )
    return result


def restricted(spec: "AblationSpec", options: argparse.Namespace) -> "AblationSpec":
    """The spec with what the options change."""
    from dataclasses import replace

    from tealightning.ablation.spec import placeholders

    changes: dict[str, Any] = {}
    if options.variants is not None:
        if unknown := [name for name in options.variants if name not in spec.variants]:
            raise UserError(f"--variants: the spec has no {unknown[0]!r}; it has {', '.join(spec.variants)}.")
        wanted = {*options.variants, spec.reference}
        changes["variants"] = {name: settings for name, settings in spec.variants.items() if name in wanted}
        used = placeholders([spec.settings, *changes["variants"].values()])
        changes["grid"] = {axis: values for axis, values in spec.grid.items() if axis in used}
    if options.seeds is not None:
        changes["seeds"] = options.seeds
    if options.out is not None:
        changes["out"] = options.out
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}.")
    return replace(spec, **changes)


def compare(args: Sequence[str]) -> None:
    """`tealightning compare ARGS`.

    Raises:
        UserError: for a spec or an option that is wrong, before anything runs.
        SystemExit: with status 1 if a run failed, after everything else was done.
    """
    options = parser().parse_args(list(args))
    from tealightning.ablation.runner import outcome_of, unfinished_jobs
    from tealightning.ablation.spec import load_spec

    spec = restricted(load_spec(options.config), options)
    if not options.report_only:
        build_playgrounds(spec.playgrounds)
    resolver = resolve if options.report_only else resolve_on_disk
    check_gold(spec, resolver)
    plan = plan_of(spec, resolver)
    if options.dry_run:
        show_plan(plan, options)
        return
    with ablation_lock(spec.folder):
        missing = [] if options.report_only else unfinished_jobs(plan.all_jobs)
        outcomes = {job.folder: outcome_of(job) for job in plan.all_jobs}
        if missing:
            outcomes |= run_missing(plan, missing, options)
        elif not options.report_only:
            print(f"All {len(plan.all_jobs)} runs have finished already.")
        failed = report(plan, outcomes, options, args)
    if failed:
        raise SystemExit(1)


def check_gold(spec: Any, resolve: "Resolve") -> None:
    """Build the reward that is only measured once, as a run would.

    Raises:
        UserError: if it cannot be built, or what it reads is not there.
    """
    gold = spec.evaluation.gold
    if gold is None:
        return
    configs = [part for path in spec.base for part in ("-c", path)]
    engine = "--rollout.engine=transformers_engine"
    try:
        resolve([*configs, engine, f"--rollout.reward={gold if isinstance(gold, str) else json.dumps(gold)}"])
    except UserError as error:
        raise UserError(str(error).replace("rollout.reward", "evaluation.gold")) from error


def plan_of(spec: Any, resolve: "Resolve") -> "Plan":
    """Every run of the ablation, checked."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from tealightning.ablation.plan import expand, make_plan

    with Progress(TextColumn("Checking variants"), BarColumn(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task("", total=len(expand(spec)))
        return make_plan(spec, resolve, lambda variant: bar.advance(task))


def resolve(args: Sequence[str]) -> dict[str, Any]:
    """The configuration that `tealightning fit ARGS` amounts to, with everything built once to see that it can be.

    Raises:
        UserError: if it cannot be parsed or built, or its settings do not go together.
    """
    return config_of(_built(args))


def resolve_on_disk(args: Sequence[str]) -> dict[str, Any]:
    """`resolve`, and a look at whether policy, prompts and reward are there.

    Raises:
        UserError: also if one of them is not.
    """
    from tealightning.cli.preflight import check_inputs

    cli = _built(args)
    check_inputs(cli)
    return config_of(cli)


def config_of(cli: "TrainingCLI") -> dict[str, Any]:
    """The configuration as plain values."""
    import yaml

    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]


def _built(args: Sequence[str]) -> "TrainingCLI":
    from tealightning.cli.console import without_announcements
    from tealightning.cli.preflight import check_together
    from tealightning.cli.training import build_training

    with contextlib.redirect_stderr(io.StringIO()), without_announcements():
        cli = build_training("fit", args)
    check_together(cli)
    return cli


def build_playgrounds(playgrounds: Sequence[dict[str, Any]]) -> None:
    """Build what is missing of the worlds that the ablation runs in."""
    from tealightning.cli.commands import playground

    for settings in playgrounds:
        playground([word for key, value in settings.items() for word in _option(key, value)])


def _option(key: str, value: Any) -> list[str]:
    """A setting as the command line takes it."""
    values = value if isinstance(value, list) else [value]
    return [f"--{key.replace('_', '-')}", *map(str, values)]


def run_missing(plan: "Plan", missing: Sequence["Job"], options: argparse.Namespace) -> dict[Path, Any]:
    """Run the jobs with a display of their progress."""
    from tealightning.ablation.progress import Display
    from tealightning.ablation.runner import environments_of, modules_to_preload, run_jobs

    environments = environments_of(options.workers)
    workers = min(len(environments), len(missing))
    print(
        f"{len(missing)} of {len(plan.all_jobs)} runs to do, {workers} at a time, in {plan.spec.folder}/runs. "
        "Stop at any time: the same command goes on.",
        flush=True,
    )
    # Set before the process is started that runs are forked from: thread counts are read when torch is imported.
    # Processes of runs leave without tidying up, and Python's resource tracker would warn of it behind the results.
    quiet = {"PYTHONWARNINGS": "ignore:resource_tracker"}
    with _environment({"OMP_NUM_THREADS": environments[0].get("OMP_NUM_THREADS", ""), **quiet}):
        try:
            return run_jobs(
                missing,
                run_job,
                workers=workers,
                retries=plan.spec.retries,
                environments=environments,
                preload=modules_to_preload(missing),
                display=Display(missing, workers, seconds_of(plan)),
            )
        except KeyboardInterrupt:
            print("\nStopped. Finished runs are kept; the same command goes on.", flush=True)
            raise SystemExit(130) from None


def run_job(job: "Job", send: "Send") -> None:
    """One run, in its own process."""
    from tealightning.ablation.worker import execute
    from tealightning.cli.console import quiet_startup
    from tealightning.cli.training import build_training

    quiet_startup()
    execute(job, lambda args: build_training("fit", args), send)


def report(plan: "Plan", outcomes: dict[Path, Any], options: argparse.Namespace, args: Sequence[str]) -> int:
    """Write results and report; the number of runs that did not finish."""
    from tealightning.ablation.analyse import analyse
    from tealightning.ablation.report import upload, write_outputs
    from tealightning.ablation.worker import write_json
    from tealightning.reporting.provenance import provenance

    folder = plan.spec.folder
    failed = [job for job in plan.all_jobs if outcomes[job.folder].status != "finished"]
    for job in failed:
        outcome = outcomes[job.folder]
        print(f"{outcome.status}: {job.title}: {outcome.error or 'not run yet'}")
    results = analyse(plan, outcomes, provenance(["compare", *args], seed=plan.spec.seeds[0]))
    write_json(folder / "results.json", results)
    files = [folder / "results.json", *write_outputs(results, folder)]
    main_table = (folder / "table.md").read_text(encoding="utf-8").split("\n## ")[1]
    print(f"\n{main_table.strip()}\n")
    print("\n".join(str(file) for file in files if file.suffix != ".svg"))
    if options.wandb:
        print(upload(results, folder, project=options.wandb))
    if failed:
        print(
            f"{len(failed)} of {len(plan.all_jobs)} runs are not in these results; the same command tries them again."
        )
    return len(failed)


def show_plan(plan: "Plan", options: argparse.Namespace) -> None:
    """What would run, and an estimate of the time."""
    from tealightning.ablation.dry_run import describe_plan, measure_pilot
    from tealightning.ablation.runner import environments_of

    seconds = seconds_of(plan)
    if not {"fit", "start"} <= seconds.keys() and not options.no_pilot:
        print("Measuring two training steps and a batch of evaluation ...", flush=True)
        environments = environments_of(options.workers)
        with _environment({"OMP_NUM_THREADS": environments[0].get("OMP_NUM_THREADS", "")}):
            seconds = measure_pilot(plan, run_job) | seconds
    print(describe_plan(plan, seconds, len(environments_of(options.workers))))


def seconds_of(plan: "Plan") -> dict[str, float]:
    """Mean wall time of the finished runs of each kind."""
    from tealightning.ablation.runner import outcome_of

    taken: dict[str, list[float]] = {}
    for job in plan.all_jobs:
        outcome = outcome_of(job)
        if outcome.status == "finished":
            taken.setdefault(job.kind, []).append(outcome.record["wall_seconds"])
    return {kind: sum(all_) / len(all_) for kind, all_ in taken.items()}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while; an empty value leaves one as it is."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if value})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ablation_lock(folder: Path) -> Any:
    """Lock of the ablation's folder: two commands would write the same results."""
    from tealightning.reliability.locks import locked

    return locked(folder, f"another `tealightning` command is at work in {shlex.quote(str(folder))}.")
