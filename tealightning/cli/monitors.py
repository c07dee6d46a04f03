"""Check what callbacks and schedules wait for (`monitor`) against the keys that the run will log."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.callbacks import RolloutCallback
from tealightning.callbacks.logged_keys import (
    is_better_if_larger,
    other_loggers,
    sometimes_logged,
    training_keys,
    validation_keys,
)
from tealightning.data import PromptDataModule
from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.training.module import PostTrainingModule

if TYPE_CHECKING:
    from tealightning.cli.training import TrainingCLI


def check_monitors(cli: "TrainingCLI", scheduler: Any) -> None:
    """Refuse a monitor whose key this run never logs, where that is certain, and warn of one that follows a reward
    downwards."""
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    rollout = next(c for c in callbacks if isinstance(c, RolloutCallback))
    training = training_keys(cli.model, rollout, callbacks)
    validation = validation_keys(cli.model, rollout)
    validates = bool(cli.trainer.limit_val_batches)
    if isinstance(cli.datamodule, PromptDataModule) and cli.datamodule.sources["val"] is None:
        validates = False
    others = other_loggers(cli.model, callbacks, PostTrainingModule)
    for where, waiting in _waiting(callbacks, scheduler):
        key, mode = waiting.monitor, getattr(waiting, "mode", None)
        if key in validation and not validates:
            raise UserError(
                f"{where}={key}: this run has no validation, which would log it (trainer.limit_val_batches)."
            )
        known = training | (validation if validates else set())
        if key not in known and not sometimes_logged(key) and key not in ("epoch", "step"):
            stages = f"Validation logs {', '.join(sorted(validation)) if validates else 'nothing'}. "
            stages += f"Training logs {', '.join(sorted(training))}."
            problem = f"{where}={key}: nothing logs that key.{did_you_mean(key, known, list_up_to=0)} {stages}"
            if not others:
                raise UserError(problem)
            rank_zero_warn(f"{problem} If {' or '.join(others)} does, all is well; else it will fail.")
        if mode == "min" and is_better_if_larger(key):
            mode_key = where.replace("monitor", "mode")
            rank_zero_warn(f"{where}={key}, of which more is better, with {mode_key}=min: set {mode_key}=max.")


def _waiting(callbacks: Any, scheduler: Any) -> Iterator[tuple[str, Any]]:
    for callback in callbacks:
        if isinstance(getattr(callback, "monitor", None), str):
            yield f"trainer.callbacks: {type(callback).__name__}.monitor", callback
    if isinstance(getattr(scheduler, "monitor", None), str):
        yield "model.lr_scheduler.monitor", scheduler
