"""Seconds of a whole training step over the sum of its bare parts on the same shapes; a table and one JSON line.

    python tools/bench_step.py --size 10m --engine vllm
    python tools/bench_step.py --size playground --estimators grpo tea direct

The steps are those of the real `Trainer` with its callbacks, reward model and logger, from the start of one batch to
the start of the next. The bare parts run after each step of the first estimator, on the shapes of its batch: the
engine's own `generate`, the reward model's forward pass on tensors tokenised beforehand, and forward, backward,
clipping and AdamW in a loop of five lines. Estimators take turns, one a step; ratios are paired, so that a busy machine
slows both sides. One more variant is the first estimator with the plain pass over prompts and completions.
"""

import argparse
import json
import os
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from bench.bare import BareParts
from bench.options import add_shape_options, chosen, describe, variants_of, world_of
from bench.steps import ENGINES, StepTimes, build_run
from bench.timing import environment, medians, paired_ratio, quiet, use_clock
from bench.world import World

from tealightning.types import PromptBatch

PLAIN = "plain"
"""Name of the first estimator's steps with `share_prompts=False`."""


def measure(world: World, options: argparse.Namespace) -> tuple[list[StepTimes], list[dict[str, float]]]:
    """The recorded steps, and the bare parts after each step of the first estimator."""
    engine = ENGINES[options.engine]()
    bare: list[dict[str, float]] = []
    parts: list[BareParts] = []

    def run_bare(step: StepTimes, batch: PromptBatch) -> None:
        if step.variant != options.estimators[0]:
            return
        if not parts:  # the engine starts with the fit
            tokens = run.module.micro_batch_tokens
            parts.append(BareParts(world, engine, group_size=options.group_size, lr=options.lr, max_tokens=tokens))
            parts[0].run(batch)  # warm-up
        bare.append(parts[0].run(batch))

    variants = variants_of(options)
    run = build_run(
        world,
        [*variants, replace(variants[0], name=PLAIN, share_prompts=False)],
        engine=engine,
        repeats=options.repeats,
        warm_up=options.warm_up,
        lr=options.lr,
        between=run_bare,
    )
    return run.fit(), bare


def summary(steps: list[StepTimes], bare: list[dict[str, float]], names: list[str]) -> dict[str, Any]:
    """Medians and ratios."""
    rows = {name: [step.row() for step in steps if step.variant == name] for name in [*names, PLAIN]}
    first, plain = rows[names[0]], [row["train"] for row in rows[PLAIN]]
    sums = [sum(row.values()) for row in bare]
    return {
        "step_over_bare": paired_ratio([row["whole"] for row in first], sums),
        "phase_over_bare": {
            phase: paired_ratio([row[phase] for row in first], [row[phase] for row in bare])["median"]
            for phase in bare[0]
            if bare[0][phase] > 0
        },
        "train_over_plain": {name: paired_ratio([r["train"] for r in rows[name]], plain) for name in names},
        "sync_share": paired_ratio([row["sync"] for row in first], [row["whole"] for row in first])["median"],
        "other_share": paired_ratio([row["other"] for row in first], [row["whole"] for row in first])["median"],
        "train_over_first": {
            name: paired_ratio([r["train"] for r in rows[name]], [r["train"] for r in first]) for name in names[1:]
        },
        "step_over_first": {
            name: paired_ratio([r["whole"] for r in rows[name]], [r["whole"] for r in first]) for name in names[1:]
        },
        "seconds": {name: {k: round(v, 5) for k, v in medians(of).items()} for name, of in rows.items()},
        "bare_seconds": {k: round(v, 5) for k, v in medians([b | {"whole": sum(b.values())} for b in bare]).items()},
    }


def print_table(result: dict[str, Any]) -> None:
    """One row a phase, one column an estimator."""
    names = list(result["seconds"])
    print(f"| {'seconds':<8} | {'bare':>8} |" + "".join(f" {name:>10} |" for name in names) + f" {names[0]}/bare |")
    print(f"|{'-' * 10}|{'-' * 10}|" + f"{'-' * 12}|" * len(names) + f"{'-' * (len(names[0]) + 7)}|")
    for phase in ("generate", "reward", "sync", "train", "other", "whole"):
        bare = result["bare_seconds"].get(phase)
        ratio = result["step_over_bare"]["median"] if phase == "whole" else result["phase_over_bare"].get(phase)
        cells = "".join(f" {result['seconds'][name][phase]:10.4f} |" for name in names)
        print(
            f"| {phase:<8} | {'' if bare is None else f'{bare:.4f}':>8} |{cells} "
            f"{'' if ratio is None else f'{ratio:.3f}':>{len(names[0]) + 5}} |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, estimators=["grpo", "tea", "direct"])
    options = parser.parse_args()
    quiet()
    use_clock(options.clock)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = world_of(options)
    result = summary(*measure(world, options), options.estimators)
    print(f"{describe(world, options)}\n")
    print_table(result)
    print("\n" + json.dumps({"bench": "step"} | chosen(options) | result | environment()))


if __name__ == "__main__":
    main()
