"""Peak memory of a training step with prompts computed once a group, over the plain pass; a table and one JSON line.

    python tools/bench_step_memory.py --size smollm2 --prompts 1 --prompt-tokens 512 --tokens 128

Both take turns in one process, on random tokens in the place of an engine's, with the same budget of tokens a pass. The
peak is that of the whole process between the rollouts and the next batch: weights, gradient, optimizer states and
activations. What a step adds at its peak to what is there before it is given beside.
"""

import argparse
import json
import os
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from bench.no_engine import NoEngine
from bench.options import add_shape_options, chosen, describe, variants_of, world_of
from bench.peak_memory import check_peaks, peak_mib, reset_peak
from bench.steps import StepTimes, build_run
from bench.timing import environment, paired_ratio, quiet
from bench.world import World

from tealightning.types import PromptBatch

SHARED, PLAIN = "shared", "plain"


def measure(world: World, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Of each variant's steps: MiB at the peak and before the step."""
    rows: dict[str, list[tuple[float, float]]] = {SHARED: [], PLAIN: []}
    device = torch.device("cpu")
    shared = replace(variants_of(options)[0], name=SHARED)

    def between(step: StepTimes, batch: PromptBatch) -> None:
        rows[step.variant].append(peaks.pop())

    run = build_run(
        world,
        [shared, replace(shared, name=PLAIN, share_prompts=False)],
        engine=NoEngine(),
        repeats=options.repeats,
        warm_up=options.warm_up,
        lr=options.lr,
        between=between,
    )
    peaks: list[tuple[float, float]] = []
    training_step = run.module.training_step

    def measured(*args: Any) -> None:
        before = reset_peak(device)
        training_step(*args)
        peaks[:] = [(peak_mib(device), before)]

    run.module.training_step = measured  # type: ignore[method-assign]
    run.fit()
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, estimators=["grpo"])
    parser.set_defaults(engine="none")
    options = parser.parse_args()
    check_peaks("cpu")
    quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = world_of(options)
    rows = measure(world, options)
    print(f"{describe(world, options)}\n")
    print(f"| pass   | peak MiB | added by the step |\n|{'-' * 8}|{'-' * 10}|{'-' * 19}|")
    for name, values in rows.items():
        added = median(peak - before for peak, before in values)
        print(f"| {name:<6} | {median(peak for peak, _ in values):8.0f} | {added:17.0f} |")
    peaks = {name: [peak for peak, _ in values] for name, values in rows.items()}
    added = {name: [peak - before for peak, before in values] for name, values in rows.items()}
    result = {
        "peak_over_plain": paired_ratio(peaks[SHARED], peaks[PLAIN]),
        "added_over_plain": paired_ratio(added[SHARED], added[PLAIN]),
        "peak_mib": {name: round(median(values), 1) for name, values in peaks.items()},
    }
    print("\n" + json.dumps({"bench": "step_memory"} | chosen(options) | result | environment()))


if __name__ == "__main__":
    main()
