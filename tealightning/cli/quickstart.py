"""`tealightning quickstart`: GRPO and TEA from one starting policy, one table, two pictures."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tealightning.cli.compare import build_playgrounds, plan_of, resolve_on_disk, run_missing
from tealightning.errors import UserError

if TYPE_CHECKING:
    from tealightning.ablation.plan import Job, Plan

DESCRIPTION = """\
Build the maze world, train GRPO and TEA from one starting policy with the same budget, and compare best-of-n on
held-out mazes. Writes summary.json, best_of_n.png, mazes.png and the trained policies. What is there already is kept:
stop at any time, the same command goes on.
"""

START, GRPO, TEA = "start", "grpo", "tea"
NAMES = {START: "start", GRPO: "GRPO", TEA: "TEA"}
PICTURED_MAZES = 4


def quickstart(args: Sequence[str]) -> None:
    """`tealightning quickstart ARGS`.

    Raises:
        ValueError: if the spec is no comparison of `grpo` and `tea` with one seed.
        SystemExit: with status 1 if a run failed.
    """
    parser = argparse.ArgumentParser(
        prog="tealightning quickstart",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "-c", "--config", type=Path, default=Path("configs/ablations/quickstart.yaml"), help="the comparison"
    )
    parser.add_argument("--workers", type=int, metavar="K", help="runs at a time; None: one a GPU, or one a CPU core")
    options = parser.parse_args(list(args))
    from tealightning.ablation.runner import outcome_of, unfinished_jobs
    from tealightning.ablation.spec import load_spec
    from tealightning.cli.compare import ablation_lock

    spec = load_spec(options.config)
    if [*spec.variants] != [GRPO, TEA] or len(spec.seeds) != 1:
        raise UserError(f"{options.config}: a quickstart compares the variants {GRPO} and {TEA} with one seed.")
    build_playgrounds(spec.playgrounds)
    plan = plan_of(spec, resolve_on_disk)
    with ablation_lock(spec.folder):
        if missing := unfinished_jobs(plan.all_jobs):
            run_missing(plan, missing, options)
        for job in plan.all_jobs:
            if (outcome := outcome_of(job)).status != "finished":
                print(f"{job.title}: {outcome.error}\nIts log: {job.folder / 'log.txt'}")
                raise SystemExit(1)
        summary = summarise(plan)
        paths = write(plan, summary)
    files = "\n".join(f"{what}: {path}" for what, path in paths.items())
    print(f"\n{files}\n\n{describe(plan)}\n\n{table(summary)}")


def summarise(plan: "Plan") -> dict[str, list[float]]:
    """Best-of-n of start, GRPO and TEA and their differences, each with its standard error over prompts."""
    from tealightning.functional.statistics import mean_over_prompts, paired_difference

    values = {name: _values(plan, job) for name, job in _jobs(plan).items()}
    columns = {name: mean_over_prompts(per_prompt) for name, (_, per_prompt) in values.items()}
    columns["tea_minus_grpo"] = paired_difference(values[GRPO], values[TEA])
    columns["tea_minus_start"] = paired_difference(values[START], values[TEA])
    columns["grpo_minus_start"] = paired_difference(values[START], values[GRPO])
    summary: dict[str, list[float]] = {"ns": list(plan.spec.evaluation.ns)}
    for name, estimate in columns.items():
        summary[name] = estimate.mean.tolist()
        summary[f"{name}_se"] = estimate.standard_error.tolist()
    return summary


def table(summary: dict[str, list[float]]) -> str:
    """The summary as a table, a row for each n."""
    lines = ["|    n | start | GRPO  | TEA   | TEA minus GRPO |", "|-----:|------:|------:|------:|---------------:|"]
    for i, n in enumerate(summary["ns"]):
        cells = " | ".join(f"{summary[name][i]:.3f}" for name in NAMES)
        difference = f"{summary['tea_minus_grpo'][i]:+.3f} ± {summary['tea_minus_grpo_se'][i]:.3f}"
        lines.append(f"| {n:>4} | {cells} | {difference:>14} |")
    return "\n".join(lines)


def describe(plan: "Plan") -> str:
    """What the table shows."""
    from tealightning.ablation.runner import outcome_of

    job = plan.jobs[TEA, plan.spec.seeds[0]]
    estimator = job.config["model"]["init_args"]["estimator"]
    records = {name: outcome_of(plan.jobs[name, plan.spec.seeds[0]]).record for name in (GRPO, TEA)}
    spent = ", ".join(f"{NAMES[name]} {record['rollouts']:,}" for name, record in records.items())
    samples = max(plan.spec.evaluation.ns)
    return (
        f"Best-of-n score on {len(_values(plan, job)[0])} held-out mazes, {samples} samples of each, after "
        f"{records[TEA]['optimizer_steps']} steps\n(rollouts: {spent}; m = {job.config['rollout']['group_size']}; TEA "
        f"is {estimator['class_path'].rpartition('.')[2]} with {_arguments(estimator)}); ± standard error over mazes"
    )


def write(plan: "Plan", summary: dict[str, list[float]]) -> dict[str, Path]:
    """Write summary, curves and picture; what is where."""
    from tealightning.ablation.worker import write_json
    from tealightning.callbacks.report import best_of_n_plot
    from tealightning.reliability.files import write_whole

    folder = plan.spec.folder
    paths = {
        "Curves": folder / "best_of_n.png",
        "Mazes": folder / "mazes.png",
        "Figures": folder / "summary.json",
        "Trained policy": plan.jobs[TEA, plan.spec.seeds[0]].folder / "policy",
    }
    write_json(paths["Figures"], summary)
    rows = [{name: values[i] for name, values in summary.items()} for i in range(len(summary["ns"]))]
    curves = best_of_n_plot([row | {"n": row["ns"]} for row in rows], {text: name for name, text in NAMES.items()})
    write_whole(paths["Curves"], curves)
    write_whole(paths["Mazes"], _picture(plan))
    return paths


def _picture(plan: "Plan") -> bytes:
    """The first test mazes with the best of N paths of each policy."""
    from rich.progress import track

    from tealightning.worlds.maze import best_paths, maze_picture

    config = plan.jobs[TEA, plan.spec.seeds[0]].config
    with Path(config["data"]["init_args"]["test"]).open(encoding="utf-8") as lines:
        grids = [json.loads(line)["grid"] for line, _ in zip(lines, range(PICTURED_MAZES), strict=False)]
    jobs = _jobs(plan)
    policies = {START: Path(config["model"]["init_args"]["policy"])} | {
        name: jobs[name].folder / "policy" for name in (GRPO, TEA)
    }
    samples = max(plan.spec.evaluation.ns)
    moves = config["rollout"]["sampling"]["max_new_tokens"]
    columns = {
        f"{NAMES[name]}, best of {samples}": best_paths(policy, grids, samples=samples, max_moves=moves)
        for name, policy in track(policies.items(), description="Picture", transient=True)
    }
    return maze_picture(grids, columns)


def _jobs(plan: "Plan") -> dict[str, "Job"]:
    seed = plan.spec.seeds[0]
    return {START: plan.starts[TEA, seed], GRPO: plan.jobs[GRPO, seed], TEA: plan.jobs[TEA, seed]}


def _values(plan: "Plan", job: "Job") -> tuple[Any, Any]:
    """Keys [Q] and best-of-n [Q, len(ns)] of the last evaluation of a run."""
    from tealightning.ablation.evaluations import read_evaluations
    from tealightning.functional.best_of_n import best_of_n

    evaluation = read_evaluations(job.folder, "val")[-1]
    return evaluation.keys, best_of_n(evaluation.rewards, plan.spec.evaluation.ns)


def _arguments(estimator: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in (estimator.get("init_args") or {}).items())
