"""Profile a training step against its bare parts: seconds of each torch operator; tables, one JSON line.

    python tools/bench_profile.py --size playground --engine transformers

`outside torch` is the time of a phase that is in no operator: Python, tokenizers, vLLM's scheduler. Profiling itself
takes time, so these are shares, not the figures of `bench_step.py`.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from bench.bare import BareParts
from bench.options import add_shape_options, chosen, describe, variants_of, world_of
from bench.steps import ENGINES, StepTimes, build_run
from bench.timing import environment, now, quiet, use_clock
from bench.world import World
from torch.profiler import ProfilerActivity, profile

from tealightning.types import PromptBatch

Operators = dict[str, dict[str, float]]
"""phase -> operator -> seconds"""


def profiled(owner: Any, method: str, seconds: dict[str, float]) -> None:
    """From now on add the seconds of each operator in `owner.method(...)` to `seconds`."""
    call: Callable[..., Any] = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = now()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            result = call(*args, **kwargs)
            whole = now() - started
        operators = {event.key: event.self_cpu_time_total / 1e6 for event in recorded.key_averages()}
        for name, value in operators.items():
            seconds[name] += value
        seconds["outside torch"] += max(0.0, whole - sum(operators.values()))
        return result

    setattr(owner, method, wrapper)


def measure(world: World, options: argparse.Namespace) -> tuple[Operators, Operators]:
    """Operators of the steps and of the bare parts, summed over `repeats` steps."""
    ours: Operators = {phase: defaultdict(float) for phase in ("generate", "reward", "train")}
    bare: Operators = {phase: defaultdict(float) for phase in ours}
    engine = ENGINES[options.engine]()
    parts: list[BareParts] = []

    def between(step: StepTimes, batch: PromptBatch) -> None:
        if not parts:
            tokens = run.module.micro_batch_tokens
            parts.append(BareParts(world, engine, group_size=options.group_size, lr=options.lr, max_tokens=tokens))
            parts[0].run(batch)  # warm-up
            for owner, method, phase in (
                (engine, "generate", "generate"),
                (run.rollout.reward, "score", "reward"),
                (run.module, "training_step", "train"),
            ):
                profiled(owner, method, ours[phase])
            for phase in bare:
                profiled(parts[0], phase, bare[phase])
        else:
            parts[0].run(batch)

    run = build_run(
        world,
        variants_of(options)[:1],
        engine=engine,
        repeats=options.repeats + 1,
        warm_up=options.warm_up,
        lr=options.lr,
        between=between,
    )
    run.fit()
    return ours, bare


def largest(ours: dict[str, float], bare: dict[str, float], count: int = 12) -> list[tuple[str, float, float]]:
    """(operator, seconds here, seconds bare) of the largest differences."""
    rows = [(name, ours.get(name, 0.0), bare.get(name, 0.0)) for name in ours.keys() | bare.keys()]
    return sorted(rows, key=lambda row: -abs(row[1] - row[2]))[:count]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, estimators=["grpo"])
    options = parser.parse_args()
    quiet()
    use_clock(options.clock)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = world_of(options)
    ours, bare = measure(world, options)
    print(f"{describe(world, options)}; sums over all steps")
    for phase in ours:
        whole, alone = sum(ours[phase].values()), sum(bare[phase].values())
        print(f"\n{phase}: {whole:.3f} s, bare {alone:.3f} s\n")
        print(f"| {'operator':<52} |    here |    bare | more    |\n|{'-' * 54}|{'-' * 9}|{'-' * 9}|{'-' * 9}|")
        for name, here, there in largest(ours[phase], bare[phase]):
            print(f"| {name[:52]:<52} | {here:7.4f} | {there:7.4f} | {here - there:+7.4f} |")
    differences = {p: {name: round(a - b, 5) for name, a, b in largest(ours[p], bare[p])} for p in ours}
    print("\n" + json.dumps({"bench": "profile"} | chosen(options) | {"more_seconds": differences} | environment()))


if __name__ == "__main__":
    main()
