"""Counts the collectives in which the ranks of a training step exchange scalars; run as a script, it is one rank."""

import json
import os
import sys
from pathlib import Path

import torch.distributed
from lightning.pytorch.callbacks import Callback
from playground_fits import data_of, module_of, rollout_of, trainer_of

from tealightning import Budget, HealthChecks

STEPS = 2
_all_reduce = torch.distributed.all_reduce


class CountsFrom(Callback):
    """Begins to count before the rollouts of each step; gradients do not pass by: DDP exchanges them in C++."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def on_train_batch_start(self, *args):
        self.steps.append([])
        torch.distributed.all_reduce = self.counted

    def counted(self, tensor, op=torch.distributed.ReduceOp.SUM, **kwargs):
        self.steps[-1].append(f"{str(op).rsplit('.', 1)[-1].lower()} of {tensor.numel()}")
        return _all_reduce(tensor, op, **kwargs)


class CountsTo(Callback):
    def on_train_batch_end(self, *args):
        torch.distributed.all_reduce = _all_reduce


def main(playground: str, folder: str) -> None:
    counts = CountsFrom()
    trainer = trainer_of(
        rollout_of(Path(playground)), Budget(), HealthChecks(), CountsTo(), max_steps=STEPS, strategy="ddp", devices=2
    )
    trainer.callbacks.insert(0, counts)
    trainer.fit(module_of(Path(playground), inner_epochs=1), datamodule=data_of(Path(playground)))
    (Path(folder) / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(counts.steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
