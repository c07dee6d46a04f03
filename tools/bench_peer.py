"""Seconds of a training step here and in TRL's GRPOTrainer, in turn in one process; a table and one JSON line.

    python tools/bench_peer.py --size 10m --engine vllm

The same work: policy, reward model, prompts, P, m, T, on-policy with one update a batch, no KL penalty, AdamW in
float32 at the same learning rate, the metrics logged every step. Here GRPO and TEA take turns (TEA without a baseline
leaves the rollouts with advantage 0 out of forward and backward pass); ratios are those of neighbouring steps. TRL is
an optional dependency: `pip install "tealightning[bench]"`.
"""

import argparse
import json
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # on CPUs compiling a helper of vLLM takes longer than it saves
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from bench.options import add_shape_options, chosen, describe, shape_of, variants_of, world_of
from bench.steps import ENGINES, StepTimes, build_run
from bench.timing import environment, medians, paired_ratio, quiet, use_clock
from bench.trl_steps import build_trl, check_trl
from bench.turns import Turns
from bench.world import World

from tealightning.training.micro_batches import tokens_of_a_pass
from tealightning.types import PromptBatch


def measure(world: World, options: argparse.Namespace) -> tuple[list[StepTimes], list[dict[str, float]]]:
    """Recorded steps of this package and of TRL."""
    turns = Turns()

    def after_ours(step: StepTimes, batch: PromptBatch) -> None:
        if step.variant == options.estimators[-1]:
            turns.hand_over()

    theirs, their_rows = build_trl(
        world,
        shape_of(options),
        engine=options.engine,
        steps=options.repeats,
        warm_up=options.warm_up,
        lr=options.lr,
        importance_correction=options.importance_correction,
        max_tokens=tokens_of_a_pass(torch.device("cpu")),
        between=turns.hand_over,
    )
    ours = build_run(
        world,
        variants_of(options),
        engine=ENGINES[options.engine](),
        repeats=options.repeats,
        warm_up=options.warm_up,
        lr=options.lr,
        between=after_ours,
    )
    turns.run(theirs.train, ours.fit)
    return ours.timer.times, their_rows


def summary(ours: list[StepTimes], theirs: list[dict[str, float]], names: list[str]) -> dict[str, Any]:
    """Medians and ratios."""
    rows = {name: [step.row() for step in ours if step.variant == name] for name in names}
    wholes = [row["whole"] for row in theirs]
    return {
        "step_over_trl": {name: paired_ratio([row["whole"] for row in rows[name]], wholes) for name in names},
        "seconds": {name: {k: round(v, 5) for k, v in medians(rows[name]).items()} for name in names},
        "trl_seconds": {k: round(v, 5) for k, v in medians(theirs).items()},
    }


def print_table(result: dict[str, Any]) -> None:
    """One row a trainer."""
    rows = {"TRL grpo": (result["trl_seconds"], None)}
    rows |= {name: (seconds, result["step_over_trl"][name]) for name, seconds in result["seconds"].items()}
    print(f"| {'':<10} | {'generate':>8} | {'reward':>8} | {'rest':>8} | {'step':>8} | over TRL            |")
    print(f"|{'-' * 12}|" + f"{'-' * 10}|" * 4 + f"{'-' * 21}|")
    for name, (seconds, ratio) in rows.items():
        generate = seconds["generate"] + seconds.get("sync", 0.0)  # TRL syncs inside its generation
        rest = seconds["whole"] - generate - seconds["reward"]
        text = "" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        cells = " | ".join(f"{v:8.4f}" for v in (generate, seconds["reward"], rest, seconds["whole"]))
        print(f"| {name:<10} | {cells} | {text:<19} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, estimators=["grpo", "tea"])
    parser.add_argument(
        "--importance-correction", action="store_true", help="let TRL correct vLLM's log-probs (a second forward pass)"
    )
    options = parser.parse_args()
    quiet()
    version = check_trl()
    use_clock(options.clock)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = world_of(options)
    result = summary(*measure(world, options), options.estimators)
    print(f"{describe(world, options)}; TRL {version}\n")
    print_table(result)
    print("\n" + json.dumps({"bench": "peer", "trl": version} | chosen(options) | result | environment()))


if __name__ == "__main__":
    main()
