"""Callbacks of Lightning that do not go together with training on rollouts: refused at the start, with the reason."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from tealightning.errors import UserError

UNSUPPORTED: dict[type, str] = {
    lightning_callbacks.StochasticWeightAveraging: (
        "it sets the learning rates in Lightning's automatic optimization, and never starts with max_epochs=-1. Use "
        "WeightAveraging, or EMAWeightAveraging"
    ),
    lightning_callbacks.ModelPruning: (
        "it replaces parameters by others of other names, which no engine knows. Prune the exported policy"
    ),
    lightning_callbacks.BackboneFinetuning: (
        "it looks for `backbone` and for layers outside of it. Write a BaseFinetuning that freezes layers of "
        "`pl_module.policy`, or set model.lora"
    ),
    lightning_callbacks.GradientAccumulationScheduler: (
        "a step is a whole batch of prompts: see data.batch_size, and model.micro_batch_tokens for memory"
    ),
    lightning_callbacks.BatchSizeFinder: (
        "data.batch_size is how many prompts a step learns from, and memory depends on model.micro_batch_tokens"
    ),
    lightning_callbacks.LearningRateFinder: (
        "it reads a loss that says nothing about the policy: compare short runs, as with tealightning compare"
    ),
    SpikeDetection: (
        "it reads the loss that training_step returns, and this one takes its optimizer steps itself. HealthChecks "
        "look for what goes wrong"
    ),
}


def check_callbacks(callbacks: Iterable[Callback], strategy: Any = None) -> None:
    """Refuse callbacks of Lightning that would change nothing, break the run, or make its numbers wrong.

    Args:
        strategy: Of the trainer, as an object or by name.
    """
    for callback in callbacks:
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} is not supported here: {reason}.")
        is_sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        if is_sharded and isinstance(
            callback, lightning_callbacks.WeightAveraging | lightning_callbacks.BaseFinetuning
        ):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} has the policy loaded before it can be sharded: use "
                "trainer.strategy=ddp or leave the callback out."
            )
