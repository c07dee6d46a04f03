"""Count rollouts and tokens, and end a run when a budget is spent."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from tealightning.errors import UserError
from tealightning.types import PromptBatch


class Budget(Callback):
    """Logs `train/total_rollouts`, `train/total_generated_tokens` and `train/total_trained_tokens`, over all ranks, and
    ends training after the step in which one of the given budgets (None = no limit) is reached.

    Generated tokens are those that the engine sampled in training, trained ones those that went through the backward
    pass: fewer where rollouts without an advantage are skipped, more with several inner epochs. Evaluation is in none.
    """

    def __init__(
        self, *, rollouts: int | None = None, generated_tokens: int | None = None, trained_tokens: int | None = None
    ) -> None:
        self.limits = {"rollouts": rollouts, "generated_tokens": generated_tokens, "trained_tokens": trained_tokens}
        for name, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise UserError(f"{name} must be at least 1 or null, got {limit}.")
        self.spent = dict.fromkeys(self.limits, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_spent(trainer)  # a run that had ended, resumed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        rollouts = batch.attached_rollouts
        own = {"rollouts": rollouts.rewards.numel(), "generated_tokens": rollouts.completion_lengths.sum()}
        counts = pl_module.over_ranks(own, "sum")
        counts["trained_tokens"] = trainer.callback_metrics["train/trained_tokens"]  # over ranks already
        for name, count in counts.items():
            self.spent[name] += round(float(count))
            pl_module.log(f"train/total_{name}", float(self.spent[name]))
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if any(limit is not None and self.spent[name] >= limit for name, limit in self.limits.items()):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = dict(state_dict["spent"])
