"""Step time over P, m and T, with fitted exponents, and over processes; a table and one JSON line.

    python tools/bench_scale.py --size playground
    python tools/bench_scale.py --size 10m --engine vllm --vary group_size --processes 1 2

One of P, m and T varies, the others stay; the shapes take turns, one a step, in one run of the real `Trainer`. The
exponent is the slope of log seconds over log shape, by least squares: 1 is linear, below 1 there are fixed costs.
`--processes` runs the base shape on each number of data-parallel processes (DDP over gloo), which share the prompts;
`speed-up` is the time of the first number over that of the others, in runs of their own that take turns.
"""

import argparse
import json
import os
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import numpy as np
import torch
from bench.options import add_shape_options, chosen, describe, shape_of, world_of
from bench.ranks import step_seconds
from bench.steps import ENGINES, Shape, Variant, build_run
from bench.timing import environment, quiet, use_clock
from bench.world import World

from tealightning.estimators import build_estimator

FACTORS = {"prompts": (0.25, 0.5, 1, 2), "group_size": (0.25, 0.5, 1, 2), "tokens": (0.25, 0.5, 1, 2)}


def shapes_of(base: Shape, vary: list[str]) -> dict[tuple[str, int], Shape]:
    """(what varies, its value) -> shape."""
    sizes = {"prompts": base.prompts, "group_size": base.group_size, "tokens": base.tokens}
    values = {name: sorted({max(1, int(sizes[name] * factor)) for factor in FACTORS[name]}) for name in vary}
    return {(name, value): Shape(**sizes | {name: value}) for name in vary for value in values[name]}


def measure(world: World, shapes: dict[tuple[str, int], Shape], options: argparse.Namespace) -> dict[str, list[float]]:
    """Shape's name -> seconds of its steps. The base shape is in every series and measured once."""
    names = {repr(shape): shape for shape in shapes.values()}
    estimator = build_estimator(options.estimators[0])
    run = build_run(
        world,
        [Variant(name=name, estimator=estimator, shape=shape) for name, shape in names.items()],
        engine=ENGINES[options.engine](),
        repeats=options.repeats,
        warm_up=options.warm_up,
        lr=options.lr,
    )
    times = run.fit()
    return {name: [step.whole for step in times if step.variant == name] for name in names}


def exponent(values: list[int], seconds: list[float]) -> float:
    """Least-squares slope of log seconds over log values."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def over_processes(options: argparse.Namespace) -> dict[int, float]:
    """Processes -> median wall-clock seconds of a step; their runs take turns."""
    shape = shape_of(options)
    job = {
        "size": options.size,
        "playground": str(options.playground),
        "cache": str(options.cache),
        "model": options.model and str(options.model),
        "prompt_tokens": options.prompt_tokens,
        "engine": options.engine,
        "repeats": options.repeats,
        "shape": {"prompts": shape.prompts, "group_size": shape.group_size, "tokens": shape.tokens},
    }
    rounds = [{count: step_seconds(count, job) for count in options.processes} for _ in range(options.rounds)]
    return {count: median(s for one in rounds for s in one[count]) for count in options.processes}


def report(shapes: dict[tuple[str, int], Shape], seconds: dict[str, float]) -> dict[str, Any]:
    """Print the table of shapes; the series and their exponents."""
    result: dict[str, Any] = {"seconds": {}, "exponent": {}}
    print(f"| {'varies':<10} | value | seconds  | exponent |\n|{'-' * 12}|{'-' * 7}|{'-' * 10}|{'-' * 10}|")
    for name in dict.fromkeys(name for name, _ in shapes):
        series = {value: seconds[repr(shape)] for (other, value), shape in shapes.items() if other == name}
        result["seconds"][name] = {value: round(s, 5) for value, s in series.items()}
        if len(series) > 1:
            result["exponent"][name] = round(exponent(list(series), list(series.values())), 4)
        for i, (value, s) in enumerate(series.items(), 1):
            last = f"{result['exponent'].get(name, float('nan')):8.3f}" if i == len(series) else " " * 8
            print(f"| {name:<10} | {value:5d} | {s:8.3f} | {last} |")
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, estimators=["grpo"])
    parser.add_argument("--vary", nargs="+", default=list(FACTORS), choices=FACTORS)
    parser.add_argument("--processes", type=int, nargs="+", default=[], help="for example 1 2")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each number of processes")
    options = parser.parse_args()
    quiet()
    use_clock(options.clock)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = world_of(options)
    shapes = shapes_of(shape_of(options), options.vary)
    print(f"{describe(world, options)}\n")
    result = report(shapes, {name: median(times) for name, times in measure(world, shapes, options).items()})
    if options.processes:
        parallel = over_processes(options)
        first = parallel[options.processes[0]]
        print("\n| processes | seconds  | speed-up |\n|-----------|----------|----------|")
        for count, seconds in parallel.items():
            print(f"| {count:9d} | {seconds:8.3f} | {first / seconds:8.2f} |")
        result["process_seconds"] = {count: round(seconds, 5) for count, seconds in parallel.items()}
    print("\n" + json.dumps({"bench": "scale"} | chosen(options) | result | environment()))


if __name__ == "__main__":
    main()
