"""`tealightning quickstart`: GRPO and TEA from one starting policy, one table, two pictures."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tealightning.cli import compare
from tealightning.errors import UserError

if TYPE_CHECKING:
    from tealightning.ablation.evaluations import EvaluationData
    from tealightning.ablation.plan import Job

DESCRIPTION = """\
Build the maze world, train GRPO and TEA from one starting policy with the same budget, and compare best-of-n on
held-out mazes. Writes summary.json, best_of_n.png, mazes.png and the trained policies. What is there already is kept:
stop at any time, the same command goes on.
"""

START, GRPO, TEA = "start", "grpo", "tea"
NAMES = {START: "start", GRPO: "GRPO", TEA: "TEA"}
PICTURED_MAZES = 4


def quickstart(args: Sequence[str]) -> None:
    """`tealightning quickstart ARGS`; exits with status 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="tealightning quickstart", description=DESCRIPTION)
    default = Path("configs/ablations/quickstart.yaml")
    parser.add_argument("-c", "--config", type=Path, default=default, help=f"the comparison; default: {default}")
    parser.add_argument("--workers", type=int, metavar="K", help=compare.WORKERS)
    options = parser.parse_args(args)
    from tealightning.ablation.evaluations import read_evaluations
    from tealightning.ablation.runner import outcome_of, unfinished_jobs
    from tealightning.ablation.spec import load_spec

    spec = load_spec(options.config)
    if [*spec.variants] != [GRPO, TEA] or len(spec.seeds) != 1:
        raise UserError(f"{options.config}: a quickstart compares the variants {GRPO} and {TEA} with one seed.")
    plan = compare.plan_of(spec)
    seed, ns = spec.seeds[0], spec.evaluation.ns
    jobs = {START: plan.starts[TEA, seed], GRPO: plan.jobs[GRPO, seed], TEA: plan.jobs[TEA, seed]}
    with compare.ablation_lock(spec.folder):
        if missing := unfinished_jobs(plan.all_jobs):
            compare.run_missing(plan, missing, options.workers)
        outcomes = {job.folder: outcome_of(job) for job in plan.all_jobs}
        for job in plan.all_jobs:
            if (outcome := outcomes[job.folder]).status != "finished":
                print(f"{job.title}: {outcome.error}\nIts log: {job.folder / 'log.txt'}")
                raise SystemExit(1)
        evaluations = {name: read_evaluations(job.folder, "val")[-1] for name, job in jobs.items()}
        summary = _summarise(evaluations, ns)
        paths = _write(jobs, summary, spec.folder, samples=max(ns))
    config, records = jobs[TEA].config, {name: outcomes[jobs[name].folder].record for name in (GRPO, TEA)}
    estimator = config["model"]["init_args"]["estimator"]
    arguments = ", ".join(f"{name}={value}" for name, value in (estimator.get("init_args") or {}).items())
    spent = ", ".join(f"{NAMES[name]} {record['rollouts']:,}" for name, record in records.items())
    files = "\n".join(f"{what}: {path}" for what, path in paths.items())
    print(
        f"\n{files}\n\nBest-of-n score on {len(evaluations[TEA].keys)} held-out mazes, {max(ns)} samples of each, "
        f"after {records[TEA]['optimizer_steps']} steps\n"
        f"(rollouts: {spent}; m = {config['rollout']['group_size']}; TEA is "
        f"{estimator['class_path'].rpartition('.')[2]} with {arguments}); ± standard error over mazes"
        f"\n\n{table(summary)}"
    )


def _summarise(evaluations: Mapping[str, "EvaluationData"], ns: Sequence[int]) -> dict[str, list[float]]:
    """Best-of-n of start, GRPO and TEA and their differences, each with its standard error over prompts."""
    from tealightning.functional.best_of_n import best_of_n
    from tealightning.functional.statistics import mean_over_prompts, paired_difference

    values = {name: (evaluation.keys, best_of_n(evaluation.rewards, ns)) for name, evaluation in evaluations.items()}
    columns = {name: mean_over_prompts(per_prompt) for name, (_, per_prompt) in values.items()}
    for before, after in ((GRPO, TEA), (START, TEA), (START, GRPO)):
        columns[f"{after}_minus_{before}"] = paired_difference(values[before], values[after])
    summary: dict[str, list[float]] = {"ns": list(ns)}
    for name, estimate in columns.items():
        summary |= {name: estimate.mean.tolist(), f"{name}_se": estimate.standard_error.tolist()}
    return summary


def table(summary: dict[str, list[float]]) -> str:
    """The summary as a table, a row for each n."""
    lines = ["|    n | start | GRPO  | TEA   | TEA minus GRPO |", "|-----:|------:|------:|------:|---------------:|"]
    for i, n in enumerate(summary["ns"]):
        cells = " | ".join(f"{summary[name][i]:.3f}" for name in NAMES)
        difference = f"{summary['tea_minus_grpo'][i]:+.3f} ± {summary['tea_minus_grpo_se'][i]:.3f}"
        lines.append(f"| {n:>4} | {cells} | {difference:>14} |")
    return "\n".join(lines)


def _write(jobs: Mapping[str, "Job"], summary: dict[str, list[float]], folder: Path, samples: int) -> dict[str, Path]:
    """Write summary, curves and picture; what is where."""
    from tealightning.ablation.worker import write_json
    from tealightning.callbacks.report import best_of_n_plot
    from tealightning.reliability.files import write_whole

    curves, mazes, figures = (folder / name for name in ("best_of_n.png", "mazes.png", "summary.json"))
    write_json(figures, summary)
    rows = [{name: values[i] for name, values in summary.items()} for i in range(len(summary["ns"]))]
    labels = {text: name for name, text in NAMES.items()}
    write_whole(curves, best_of_n_plot([row | {"n": row["ns"]} for row in rows], labels))
    write_whole(mazes, _picture(jobs, samples))
    return {"Curves": curves, "Mazes": mazes, "Figures": figures, "Trained policy": jobs[TEA].folder / "policy"}


def _picture(jobs: Mapping[str, "Job"], samples: int) -> bytes:
    """The first test mazes with the best of N paths of each policy."""
    from rich.progress import track

    from tealightning.worlds.maze import best_paths, maze_picture

    config = jobs[TEA].config
    with Path(config["data"]["init_args"]["test"]).open(encoding="utf-8") as lines:
        grids = [json.loads(line)["grid"] for line, _ in zip(lines, range(PICTURED_MAZES), strict=False)]
    policies = {name: jobs[name].folder / "policy" for name in (GRPO, TEA)}
    policies = {START: Path(config["model"]["init_args"]["policy"])} | policies
    moves = config["rollout"]["sampling"]["max_new_tokens"]
    columns = {
        f"{NAMES[name]}, best of {samples}": best_paths(policy, grids, samples=samples, max_moves=moves)
        for name, policy in track(policies.items(), description="Picture", transient=True)
    }
    return maze_picture(grids, columns)
