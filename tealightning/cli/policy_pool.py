"""Sample a pool of rollouts with the policy, engine, reward and prompts of a config."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from tealightning.callbacks import RolloutCallback
from tealightning.cli.training import build_training
from tealightning.data import PromptDataModule
from tealightning.diagnostics.pool import RolloutPool, pool_of
from tealightning.errors import UserError
from tealightning.training.module import PostTrainingModule
from tealightning.types import PromptBatch

_COMMANDS = {"val": "validate", "test": "test"}


def collect_pool(
    args: Sequence[str], *, num_prompts: int, num_samples: int, split: Literal["val", "test"] = "val"
) -> tuple[PostTrainingModule, RolloutPool]:
    """Sample and score `num_samples` rollouts of the split's first `num_prompts` prompts.

    It is a `tealightning validate ARGS` (or `test`) with `max(ns) = num_samples`: the same engine, reward, sampling and
    seeds. Loggers and the config's callbacks are left out, and a prompt is a batch.

    Args:
        args: Of the config: `["-c", "configs/quickstart.yaml", "--rollout.engine=TransformersEngine"]`.

    Returns:
        The module, its policy on the device that it sampled on, and the pool.

    Raises:
        UserError: for a config that does not parse, a split with fewer prompts, or several devices.
    """
    command = _COMMANDS[split]
    cli = build_training(command, [*args, *_overrides(num_prompts, num_samples)])
    if cli.trainer.world_size > 1:  # before any process is launched
        raise UserError(
            f"a pool is collected on one device, got {cli.trainer.world_size}: set --trainer.devices=1 "
            "(and --trainer.num_nodes=1)."
        )
    keeper = _Keeper(split, num_prompts)
    cli.trainer.callbacks.append(keeper)  # type: ignore[attr-defined]
    cli.datamodule.val_batch_size = 1
    device = cli.trainer.strategy.root_device
    run = getattr(cli.trainer, command)
    run(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config[command]["ckpt_path"], verbose=False)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.close()
    return cli.model.to(device), pool_of(keeper.batches)


class _Keeper(Callback):
    """Keeps the batches of an evaluation, their rollouts on the CPU."""

    def __init__(self, split: Literal["val", "test"], num_prompts: int) -> None:
        self.split = split
        self.num_prompts = num_prompts
        self.batches: list[PromptBatch] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would give another pool than was asked for, before anything is sampled."""
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        there = len(data.prompt_sets[self.split])
        if there < self.num_prompts:
            raise UserError(f"data.{self.split} has {there} prompts, and {self.num_prompts} were asked for.")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int, *args: Any
    ) -> None:
        self._keep(batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int, *args: Any
    ) -> None:
        self._keep(batch)

    def _keep(self, batch: PromptBatch) -> None:
        self.batches.append(batch.to("cpu"))


def _overrides(num_prompts: int, num_samples: int) -> list[str]:
    """Settings that win over the config's."""
    return [
        f"--model.ns=[{num_samples}]",
        f"--trainer.limit_val_batches={num_prompts}",
        f"--trainer.limit_test_batches={num_prompts}",
        "--trainer.logger=false",
        "--trainer.callbacks=null",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_model_summary=false",
    ]
