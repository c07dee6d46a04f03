"""Count rollouts and tokens, and end a run when a budget is spent."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from tealightning.errors import UserError
from tealightning.types import PromptBatch

COUNTED = ("rollouts", "generated_tokens", "trained_tokens")


class Budget(Callback):
    """Logs `train/total_rollouts`, `train/total_generated_tokens` and `train/total_trained_tokens`, over all ranks, and
    ends training after the step in which one of the given budgets is reached.

    Generated tokens are those that the engine sampled in training, trained ones those that went through the backward
    pass: fewer where rollouts without an advantage are skipped, more with several inner epochs. Evaluation is in none.

    Args:
        rollouts: Completions to train with; None = no limit.
        generated_tokens: Completion tokens to sample; None = no limit.
        trained_tokens: Completion tokens to train on; None = no limit.

    Raises:
        ValueError: for a budget below 1.
    """

    def __init__(
        self, *, rollouts: int | None = None, generated_tokens: int | None = None, trained_tokens: int | None = None
    ) -> None:
        self.limits = dict(zip(COUNTED, (rollouts, generated_tokens, trained_tokens), strict=True))
        for name, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise UserError(f"{name} must be at least 1 or null, got {limit}.")
        self.spent = dict.fromkeys(COUNTED, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_spent:  # a run that had ended, resumed
            trainer.should_stop = True

    @property
    def is_spent(self) -> bool:
        """Whether one of the budgets is reached."""
        return any(limit is not None and self.spent[name] >= limit for name, limit in self.limits.items())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        rollouts = batch.rollouts
        assert rollouts is not None, "the rollout callback attaches them before the batch"
        counts = torch.stack([torch.tensor(rollouts.rewards.numel()), rollouts.completion_lengths.sum().cpu()])
        totals = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").tolist()
        trained = trainer.callback_metrics["train/trained_tokens"]  # over ranks already
        for name, count in zip(COUNTED, (*totals, float(trained)), strict=True):
            self.spent[name] += round(count)
            pl_module.log(f"train/total_{name}", float(self.spent[name]))
        if self.is_spent:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = dict(state_dict["spent"])
