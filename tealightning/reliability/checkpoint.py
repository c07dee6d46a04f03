"""Checkpoints for exact resume, and how a run stops."""

import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.errors import UserError
from tealightning.reliability import rescue
from tealightning.reliability.checkpoint_files import (
    checkpoint_file,
    move_folder,
    remove_older,
    warn_if_the_next_may_not_fit,
)
from tealightning.reliability.files import run_folder
from tealightning.reliability.progress import RunPhase, during
from tealightning.reliability.step_snapshot import (
    RANKS,
    Boundary,
    HasRankState,
    after_epoch,
    before_validation,
    boundary_of,
    has_finite_weights,
    is_ending,
    over_ranks,
    random_state,
    rank_state,
    set_random_state,
    will_validate,
)
from tealightning.reliability.stop_signals import StopRequestedError, StopSignals

DEFAULT_EVERY_N_STEPS = 20


class ResumableCheckpoint(Checkpoint):
    """Writes `<run folder>/checkpoints/step=<optimizer step>.ckpt` every few steps and when training ends, and stops a
    run such that it can go on.

    A checkpoint holds all that the rest of the run depends on: beside what Lightning saves, the random streams of every
    rank and the rollouts that are sampled but not trained on yet (`rollout.steps_ahead`). One that is due at a
    validation is written before it, and a resumed run repeats the validation.

    After SIGTERM or SIGINT the run ends its step, writes a checkpoint and exits with status 143 or 130, all ranks at
    the same step; a second signal ends it at once. After an exception it writes one of the last completed step (see
    `rescue`). In both cases it prints how to go on.

    Args:
        every_n_steps: Steps (batches of prompts) between checkpoints; None = 20, or, where `trainer.callbacks` has a
            checkpoint callback of its own, none but those of a run that is stopped.
        keep: The newest checkpoints of a run that are kept: with 2 there is one before a newest one that is damaged.

    Raises:
        ValueError: if one of them is below 1.
    """

    def __init__(self, *, every_n_steps: int | None = None, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} must be at least 1, got {value}.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.resume_command: str | None = None
        """What the user is told to call to go on, once a checkpoint is there."""
        self.folder: Path | None = None
        self.boundary: Boundary | None = None
        self.is_moving = False  # an optimizer step has begun since the boundary
        self.validation_due = False
        self.saved: Path | None = None  # the newest one of this run
        self.rescued: Boundary | None = None  # while a rescue writes: what it writes
        self._signals = StopSignals()
        self._stop = 0  # the signal that all ranks have agreed on
        self._is_due = False
        self._random: dict[str, Any] | None = None  # of the checkpoint that was loaded
        self._is_saving = False

    # ---------------------------------------------------------------- life cycle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer) / "checkpoints"
        others = [callback for callback in trainer.checkpoint_callbacks if callback is not self]
        if self.every_n_steps is None and not others:
            self.every_n_steps = DEFAULT_EVERY_N_STEPS

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop = max(over_ranks(self._signals.received))
        self._end_if_asked(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()
        self.is_moving = False
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        is_agreed = isinstance(exception, StopRequestedError) and trainer.global_rank > 0  # rank 0 tells and saves
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run and not is_agreed:  # type: ignore[attr-defined]
            with during(RunPhase.SAVING):
                told = rescue.after(exception, self, trainer, pl_module)
            print(f"tealightning: {told}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = bool(state_dict["validation_due"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Also of a checkpoint that another callback writes. Then, and for its own, this is a call of all ranks."""
        if self.rescued is not None:
            self.rescued.put_into(checkpoint, trainer.datamodule)  # type: ignore[attr-defined]
            checkpoint[RANKS] = self.rescued.ranks
            return
        if self._is_saving and self.boundary is not None:
            self.boundary.put_into(checkpoint, trainer.datamodule)  # type: ignore[attr-defined]
        checkpoint[RANKS] = over_ranks(rank_state(trainer))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        ranks = checkpoint.get(RANKS, [])
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint has random streams of {len(ranks)} processes and this run has {trainer.world_size}: "
                "they start anew, and rollouts that were sampled ahead are sampled again."
            )
            return
        mine = ranks[trainer.global_rank]
        self._random = mine["random"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HasRankState):
                callback.load_rank_state_dict(mine["callbacks"].get(callback.state_key, {}))

    # ---------------------------------------------------------------- steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.is_moving = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        everyone = over_ranks((self._signals.received, random_state()))
        self._stop = max(signum for signum, _ in everyone)
        self.boundary = boundary_of(trainer, [{"random": streams, "callbacks": {}} for _, streams in everyone])
        self.is_moving = False
        every = self.every_n_steps or 0
        is_due = bool(every) and (self.boundary.batches % every == 0 or is_ending(trainer))
        self._is_due = self._is_due or is_due or bool(self._stop)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not will_validate(trainer):
            self._save_and_end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._is_after_a_step(trainer):
            self.validation_due = True
            self._pass_boundary(trainer)
            before_validation(self.boundary)  # type: ignore[arg-type]
            self._save_and_end(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1:  # ranks may have unequal numbers
            self._stop = self._signals.received
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validation_due = False
        if self._is_after_a_step(trainer):
            self._pass_boundary(trainer)
            self._stop = max(over_ranks(self._signals.received))
            self._is_due = bool(self._stop)
            self._save_and_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._is_after_a_step(trainer):
            self._pass_boundary(trainer)
            after_epoch(self.boundary, trainer)  # type: ignore[arg-type]
            self._save_and_end(trainer)

    # ---------------------------------------------------------------- saving

    def save(self, trainer: pl.Trainer) -> bool:
        """Write a checkpoint of the boundary; a call of all ranks.

        Returns:
            Whether the disk took it; if not, there is a warning, and the older ones are as they were.

        Raises:
            ValueError: if the weights are not finite: such a checkpoint would in the end replace the good ones.
        """
        assert self.folder is not None
        if not all(over_ranks(has_finite_weights(trainer.lightning_module))):
            raise UserError(
                f"The weights are not finite after optimizer step {trainer.global_step}: nothing was saved. Go on from "
                "the newest checkpoint with a lower learning rate or model.gradient_clip_norm."
            )
        path = checkpoint_file(self.folder, trainer.global_step)
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)  # writes a folder, or no whole file
        written = path.with_name(f".{path.name}.part") if is_sharded else path
        if is_sharded and trainer.is_global_zero:
            shutil.rmtree(written, ignore_errors=True)  # of a run that was killed
        self._is_saving, refused = True, False
        try:
            with during(RunPhase.SAVING):
                trainer.save_checkpoint(written, weights_only=False)
        except OSError as error:
            if is_sharded:
                raise  # any rank may be the one that could not write
            refused = True
            rank_zero_warn(
                f"The checkpoint of step {trainer.global_step} could not be written ({error}). Free space on the disk "
                f"of {self.folder}: training goes on, the checkpoints there stay, and the next one will be tried."
            )
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        finally:
            self._is_saving = False
        if any(over_ranks(refused)):
            return False
        if trainer.is_global_zero:
            if is_sharded:
                move_folder(written, path, trainer.global_step)
            remove_older(self.folder, self.keep)
            warn_if_the_next_may_not_fit(path)
        trainer.strategy.barrier("checkpoint")
        self.saved = path
        return True

    def _is_after_a_step(self, trainer: pl.Trainer) -> bool:
        return self.boundary is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING

    def _pass_boundary(self, trainer: pl.Trainer) -> None:
        """Of the same step, further on."""
        assert self.boundary is not None
        self.boundary = boundary_of(trainer, self.boundary.ranks)

    def _save_and_end(self, trainer: pl.Trainer) -> None:
        if self._is_due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            is_saved = self.save(trainer)
            if not is_saved and is_ending(trainer) and not self._stop:
                raise OSError(
                    f"The last checkpoint could not be written. Free space on the disk of {self.folder}, then go on "
                    "from the one before."
                )
        self._is_due = False
        self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: pl.Trainer) -> None:
        if self._stop:
            raise StopRequestedError(self._stop, trainer.global_rank)
