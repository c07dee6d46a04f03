"""One rank of a data-parallel run that `bench_scale.py` starts: times its steps; rank 0 prints them as a JSON line."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.steps import ENGINES, Shape, Variant, build_run
from bench.timing import quiet, use_clock
from bench.world import build_world
from tealightning.estimators import build_estimator


def main() -> None:
    """Times of the recorded steps, in seconds."""
    options = json.loads(sys.argv[1])
    quiet()
    use_clock("wall")  # what the ranks wait for each other counts
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = build_world(
        options["size"],
        playground=Path(options["playground"]),
        cache=Path(options["cache"]),
        model=options["model"] and Path(options["model"]),
        prompt_tokens=options["prompt_tokens"],
    )
    variant = Variant(name="step", estimator=build_estimator("grpo"), shape=Shape(**options["shape"]))
    ranks = int(os.environ["WORLD_SIZE"])
    parallel = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    run = build_run(world, [variant], engine=ENGINES[options["engine"]](), repeats=options["repeats"], **parallel)
    times = [step.whole for step in run.fit()]
    if run.trainer.is_global_zero:
        print(json.dumps(times))


if __name__ == "__main__":
    main()
