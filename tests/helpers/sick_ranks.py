"""One rank of a training run in which the loss of rank 1 is NaN at some steps; run as a script."""

import math
import os
import sys
from pathlib import Path

import torch
from gradient_cases import SPREAD, flat, module_of, strategy_of
from lightning.pytorch.callbacks import Callback
from module_fixtures import make_batch, make_rollouts, run_steps

from tealightning import HealthChecks, UnhealthyRun

SICK = [False, True, False, True, True, False]
"""By batch; the run ends after two in a row."""


class WeightsAfterSteps(Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(flat(pl_module.policy.parameters()).clone())


def main(policy: str, folder: str, strategy: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    module = module_of(policy, {"lr": 0.05, "micro_batch_size": 3})
    healthy, sick = module.estimator, list(SICK)

    def estimator(rewards):
        return healthy(rewards) * (math.nan if sick.pop(0) and rank == 1 else 1.0)

    estimator.min_group_size = 1
    module.estimator = estimator
    # The rollouts are made up, and so are their log-probs.
    health = HealthChecks(stop_on=["nonfinite"], max_nonfinite_steps=2)
    weights, error = WeightsAfterSteps(), ""
    batches = [make_batch(make_rollouts(SPREAD, seed=10 * step + rank)) for step in range(len(SICK))]
    own = {"use_distributed_sampler": False, "default_root_dir": folder}  # each rank has made its own batches
    try:
        run_steps(module, batches, callbacks=[weights, health], strategy=strategy_of(strategy), devices=2, **own)
    except UnhealthyRun as raised:
        error = str(raised)
    told = {"weights": torch.stack(weights.weights), "error": error, "counts": health.counts}
    torch.save(told | {"skipped": module.skipped.total}, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
