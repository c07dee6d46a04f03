"""CPU seconds of training until best-of-n is good enough on mazes, here and in TRL; a table, a plot and one JSON line.

    python tools/bench_quality.py
    python tools/bench_quality.py --until 0.8 --seeds 0 1 2 3 4 --trl-lr 1e-5 3e-5 1e-4

Both sides begin with the same policy, sample with `generate` of transformers, score with the same verifier, make one
AdamW step on each batch of P prompts with m rollouts, and are evaluated alike every few steps, which is not counted:
best-of-n over held-out mazes, n samples each. Here trains the estimator that docs/which-estimator.md recommends; TRL
trains GRPO with its own defaults, at the learning rate of `--trl-lr` that got furthest with the first seed. The world
is one whose policy starts below `--until`. TRL is an optional dependency: `pip install "tealightning[bench]"`.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from bench.quality import Point, Task, over, seconds_until, train_here, train_in_trl
from bench.timing import environment, quiet, use_clock
from bench.trl_steps import check_trl
from bench.world import CACHE

from tealightning.estimators import build_estimator
from tealightning.worlds.maze_build import build_maze


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--until", type=float, default=0.7, help="best-of-n to reach")
    options.add_argument("--n", type=int, default=128, help="samples of a held-out maze, and of what is the best taken")
    options.add_argument("--held-out", type=int, default=64, help="mazes of an evaluation")
    options.add_argument("--greedy", type=float, default=0.1, help="of the walks that the first policy learns from")
    options.add_argument("--prompts", type=int, default=8, help="P, prompts a step")
    options.add_argument("--group-size", type=int, default=16, help="m, rollouts a prompt")
    options.add_argument("--tokens", type=int, default=16, help="most tokens of a rollout")
    options.add_argument("--every", type=int, default=10, help="steps between evaluations")
    options.add_argument("--max-steps", type=int, default=100)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--lr", type=float, default=2e-4, help="here")
    options.add_argument(
        "--trl-lr", type=float, nargs="+", default=[1e-5, 1e-4, 3e-4], help="tried with the first seed"
    )
    options.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the world")
    options.add_argument("--plot", type=Path, default=Path("runs/bench/quality.png"))
    return options


def measure(options: argparse.Namespace) -> dict[str, list[list[Point]]]:
    """Side -> the curve of each seed."""
    folder = options.cache / f"maze-greedy-{options.greedy:g}"
    build_maze(folder, greedy=options.greedy, progress=False)
    shared = {name: getattr(options, name) for name in ("prompts", "group_size", "tokens", "max_steps", "every", "n")}
    label = ""

    def show(point: Point) -> None:
        print(f"  {label:<24} step {point.step:4d}  {point.seconds:7.1f} s  {point.value:.3f}", flush=True)

    task = Task(folder=folder, until=options.until, held_out=options.held_out, on_point=show, **shared)
    tried = {}
    for lr in options.trl_lr:
        label = f"TRL, lr {lr:g}, seed {options.seeds[0]}"
        tried[lr] = train_in_trl(task, lr=lr, seed=options.seeds[0])
    options.trl_lr = max(tried, key=lambda lr: rank(tried[lr], options.until))
    curves: dict[str, list[list[Point]]] = {"here": [], "TRL": [tried[options.trl_lr]]}
    for seed in options.seeds:
        label = f"here, seed {seed}"
        estimator = build_estimator("optimal_tea", target_n=options.n, alpha=1.0, scale="group_std", scale_weight=0.5)
        curves["here"].append(train_here(task, estimator, lr=options.lr, seed=seed))
    for seed in options.seeds[1:]:
        label = f"TRL, lr {options.trl_lr:g}, seed {seed}"
        curves["TRL"].append(train_in_trl(task, lr=options.trl_lr, seed=seed))
    return curves


def rank(points: list[Point], until: float) -> tuple[float, float]:
    """Sooner is better; of those that never get there the one that gets furthest after its start."""
    seconds = seconds_until(points, until)
    best = max(point.value for point in points[1:])
    return (float("-inf") if seconds is None else -seconds, best)


def print_table(curves: dict[str, list[list[Point]]], options: argparse.Namespace) -> None:
    """A row a side and seed."""
    print(f"\n| {'':<6} | seed | start | best  | last  | seconds to {options.until:g} | of      |")
    print(f"|{'-' * 8}|------|-------|-------|-------|{'-' * (13 + len(f'{options.until:g}'))}|---------|")
    for side, runs in curves.items():
        for seed, points in zip(options.seeds, runs, strict=True):
            seconds = seconds_until(points, options.until)
            reached = "never" if seconds is None else f"{seconds:.1f}"
            best = max(point.value for point in points[1:])
            print(
                f"| {side:<6} | {seed:4d} | {points[0].value:.3f} | {best:.3f} | {points[-1].value:.3f} | "
                f"{reached:>{11 + len(f'{options.until:g}')}} | {points[-1].seconds:7.1f} |"
            )


def plot(curves: dict[str, list[list[Point]]], options: argparse.Namespace) -> None:
    """Curves of all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for color, (side, runs) in zip(("#2e7d32", "#c62828"), curves.items(), strict=True):
        for i, points in enumerate(runs):
            name = None if i else {"here": "tealightning, optimal_tea", "TRL": "TRL, GRPO"}[side]
            axes.plot([p.seconds for p in points], [p.value for p in points], ".-", color=color, label=name)
    axes.axhline(options.until, color="gray", linestyle=":")
    axes.set(xlabel="CPU seconds of training", ylabel=f"best of {options.n} on held-out mazes")
    axes.legend()
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=150)


def summary(curves: dict[str, list[list[Point]]], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON line says."""
    seconds = {side: [seconds_until(points, options.until) for points in runs] for side, runs in curves.items()}
    budgets = [points[-1].seconds for points in curves["TRL"]]
    best = {side: [max(point.value for point in points[1:]) for points in runs] for side, runs in curves.items()}
    return {
        "seconds_over_trl": over(seconds["here"], seconds["TRL"], budgets),
        "seconds": seconds,
        "trl_budget_seconds": budgets,
        "start": round(curves["here"][0][0].value, 4),
        "best": {
            side: {"mean": round(mean(values), 4), "sd": round(stdev(values), 4) if len(values) > 1 else None}
            for side, values in best.items()
        },
    }


def main() -> None:
    """Measure, print and plot."""
    options = parser().parse_args()
    quiet()
    version = check_trl()
    use_clock("cpu")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    curves = measure(options)
    print_table(curves, options)
    result = summary(curves, options)
    found = result["seconds_over_trl"]
    if found["ratio"] is None:
        print(f"\n{options.until:g} was not reached with every seed here.")
    else:
        at_most = "at most " if found["is_bound"] else ""
        print(f"\nSeconds to {options.until:g} here over TRL's: {at_most}{found['ratio']:.3f}")
    plot(curves, options)
    print(options.plot)
    chosen = {key: value for key, value in vars(options).items() if key not in ("cache", "plot")}
    line = {"bench": "quality", "trl": version, "size": "mazes", "engine": "transformers"} | chosen | result
    print("\n" + json.dumps(line | environment()))


if __name__ == "__main__":
    main()
