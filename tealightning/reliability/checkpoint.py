"""Checkpoints for exact resume, and how a run stops."""

import contextlib
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.errors import UserError
from tealightning.reliability import checkpoint_files as files
from tealightning.reliability import step_snapshot as snapshots
from tealightning.reliability.files import run_folder
from tealightning.reliability.fingerprint import fingerprint
from tealightning.reliability.locks import locked
from tealightning.reliability.progress import Activity, during
from tealightning.reliability.ranks import over_ranks

DEFAULT_EVERY_N_STEPS = 20
_LOCK_SECONDS = 300.0


class ResumableCheckpoint(Checkpoint):
    """Writes `<run folder>/checkpoints/step=<optimizer step>.ckpt` every few steps and when training ends, and stops a
    run such that it can go on.

    A checkpoint holds all that the rest of the run depends on: beside what Lightning saves, the random streams of every
    rank and the rollouts that are sampled but not trained on yet (`rollout.steps_ahead`). One that is due at a
    validation is written before it, and a resumed run repeats the validation.

    After SIGTERM or SIGINT the run ends its step, writes a checkpoint and exits with status 143 or 130, all ranks at
    the same step; a second signal ends it at once. After an exception it writes one of the last completed step, if the
    weights still are those of it. In both cases it prints how to go on.

    Args:
        every_n_steps: Steps (batches of prompts) between checkpoints; None = 20, or, where `trainer.callbacks` has a
            checkpoint callback of its own, none but those of a run that is stopped.
        keep: The newest checkpoints of a run that are kept: with 2 there is one before a newest one that is damaged.
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
        self.validation_due = False
        self._snapshot: snapshots.StepSnapshot | None = None  # of the last completed step
        self._is_moving = False  # an optimizer step has begun since the snapshot
        self._written: snapshots.StepSnapshot | None = None  # while it is written into a checkpoint
        self._saved: Path | None = None  # the newest checkpoint of this run
        self._received = 0  # signal that this process got; 0 = none
        self._stop = 0  # the signal that all ranks have agreed on
        self._is_due = False
        self._before_validation: bytes | None = None  # fingerprint of the weights
        self._random: dict[str, Any] | None = None  # of the checkpoint that was loaded

    def _take_over_signals(self) -> None:
        """Handle SIGTERM and SIGINT, unless they are ignored, until Lightning puts its handlers back. Its own one of
        SIGTERM calls collectives in the middle of others, and a run that it ends exits with status 0."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal; the second one does what it does by default."""
        if self._received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._received = signum
        name = signal.Signals(signum).name
        # Not print: it is not allowed to be entered a second time, and the signal may have come in the middle of one.
        start = "\n" if os.isatty(2) else ""  # below a progress bar and the terminal's ^C
        os.write(2, f"{start}tealightning: {name}: stopping after this step (again: at once)\n".encode())

    def _end_if_asked(self, trainer: pl.Trainer) -> None:
        if self._stop:
            # Lightning's launcher would kill rank 0, which may still be writing, if another one failed.
            raise SystemExit(128 + self._stop if trainer.is_global_zero else 0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer) / "checkpoints"
        if self.every_n_steps is None and trainer.checkpoint_callbacks == [self]:
            self.every_n_steps = DEFAULT_EVERY_N_STEPS

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_over_signals()

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop = max(over_ranks(self._received))
        self._end_if_asked(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_over_signals()
        self._is_moving = False
        if self._random is not None:
            snapshots.set_random_state(self._random)
            self._random = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SystemExit) and not trainer.is_global_zero:
            return  # all ranks stop, and rank 0 tells and saves
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with during(Activity.SAVING):
                message = self._rescue(trainer, pl_module)
            print(f"tealightning: {message}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = bool(state_dict["validation_due"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Also of a checkpoint that another callback writes; this is then a call of all ranks."""
        if (snapshot := self._written) is None:
            checkpoint[snapshots.RANKS] = over_ranks(snapshots.rank_state(trainer))
            return
        # What the checkpoint says is of a later moment, such as one in the middle of a step.
        checkpoint["loops"]["fit_loop"] = snapshot.loops
        checkpoint["callbacks"] = snapshot.callbacks
        checkpoint[snapshots.RANKS] = snapshot.ranks
        if snapshot.datamodule:
            checkpoint[type(trainer.datamodule).__qualname__] = snapshot.datamodule  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        ranks = checkpoint.get(snapshots.RANKS, [])
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint has random streams of {len(ranks)} processes and this run has {trainer.world_size}: "
                "they start anew, and rollouts that were sampled ahead are sampled again."
            )
            return
        mine = ranks[trainer.global_rank]
        self._random = mine["random"]
        for callback in snapshots.callbacks_with_rank_state(trainer):
            callback.load_rank_state_dict(mine["callbacks"].get(callback.state_key, {}))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._is_moving = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        everyone = over_ranks((self._received, snapshots.random_state()))
        self._stop = max(signum for signum, _ in everyone)
        ranks = [{"random": streams, "callbacks": {}} for _, streams in everyone]
        self._snapshot = snapshots.take_snapshot(trainer, ranks)
        self._is_moving = False
        every = self.every_n_steps or 0
        is_due = bool(every) and (self._snapshot.batches % every == 0 or snapshots.is_ending(trainer))
        self._is_due = self._is_due or is_due or bool(self._stop)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not snapshots.will_validate(trainer):
            self._save_and_end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._is_after_a_step(trainer):
            self._before_validation = fingerprint(pl_module)
            self.validation_due = True  # before the snapshot, which holds it
            snapshots.mark_before_validation(self._snapshot_again(trainer))
            self._save_and_end(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1:  # ranks may have unequal numbers
            self._stop = self._received
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validation_due, self._before_validation = False, None
        if self._is_after_a_step(trainer):
            self._snapshot_again(trainer)
            self._stop = max(over_ranks(self._received))
            self._is_due = bool(self._stop)
            self._save_and_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._is_after_a_step(trainer):
            snapshots.mark_after_epoch(self._snapshot_again(trainer), trainer)
            self._save_and_end(trainer)

    def _is_after_a_step(self, trainer: pl.Trainer) -> bool:
        return self._snapshot is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING

    def _snapshot_again(self, trainer: pl.Trainer) -> snapshots.StepSnapshot:
        """Snapshot of the same step, further on."""
        assert self._snapshot is not None
        self._snapshot = snapshots.take_snapshot(trainer, self._snapshot.ranks)
        return self._snapshot

    def _save_and_end(self, trainer: pl.Trainer) -> None:
        if self._is_due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            is_saved = self.save(trainer)
            if not is_saved and snapshots.is_ending(trainer) and not self._stop:
                raise OSError(
                    f"The last checkpoint could not be written. Free space on the disk of {self.folder}, then go on "
                    "from the one before."
                )
        self._is_due = False
        self._end_if_asked(trainer)

    def save(self, trainer: pl.Trainer) -> bool:
        """Write a checkpoint of the last completed step, and return whether the disk took it; a call of all ranks.

        If it did not, there is a warning, and the older ones are as they were."""
        assert self.folder is not None and self._snapshot is not None
        # A checkpoint of such weights would in the end replace the good ones.
        if not all(over_ranks(snapshots.has_finite_weights(trainer.lightning_module))):
            raise UserError(
                f"The weights are not finite after optimizer step {trainer.global_step}: nothing was saved. Go on from "
                "the newest checkpoint with a lower learning rate or model.gradient_clip_norm."
            )
        path = files.checkpoint_file(self.folder, trainer.global_step)
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)  # writes a folder, or no whole file
        target = path.with_name(f".{path.name}.part") if is_sharded else path
        if is_sharded and trainer.is_global_zero:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
        refused = False
        try:
            with during(Activity.SAVING):
                self._written = replace(self._snapshot, ranks=over_ranks(snapshots.rank_state(trainer)))
                trainer.save_checkpoint(target, weights_only=False)
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
            self._written = None
        if any(over_ranks(refused)):
            return False
        if trainer.is_global_zero:
            if is_sharded:
                files.move_folder(target, path, trainer.global_step)
            files.remove_older(self.folder, self.keep)
            files.warn_if_the_next_may_not_fit(path)
        trainer.strategy.barrier("checkpoint")
        self._saved = path
        return True

    def _rescue(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """Save what can be saved, and say how to go on. Raises nothing: the exception at hand is the one to be seen.

        No collectives: other ranks may be dead or wait for this one. The first rank that comes here writes."""
        path: Path | str | None = None
        try:
            step, path = self._save_last_step(trainer, pl_module)
            what = f"Step {step} is saved in {path}."
        except snapshots.CannotSaveError as error:
            what = f"Nothing was saved: {error}."
        except Exception as error:  # whatever it is: it must not take the place of the error that ended the run
            what = f"The last step could not be saved: {type(error).__name__}: {error}."
        if path is None:
            newest = files.newest_good(self.folder, lambda damaged: None) if self.folder is not None else None
            if (path := newest or trainer.ckpt_path) is None:
                return f"{what} There is no checkpoint of this run yet."
            what += f" The newest checkpoint is {path}."
        return f"{what} To go on:\n  {self.resume_command or f'trainer.fit(..., ckpt_path={str(path)!r})'}"

    def _save_last_step(self, trainer: pl.Trainer, pl_module: Any) -> tuple[int, Path]:
        """The last completed (optimizer) step and its checkpoint, which is written if there is none yet."""
        snapshot = snapshots.snapshot_after_error(self._snapshot, is_moving=self._is_moving, trainer=trainer)
        assert self.folder is not None
        path = files.checkpoint_file(self.folder, snapshot.global_step)
        if self._saved == path:
            return snapshot.global_step, path
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise snapshots.CannotSaveError("the weights are sharded, and gathering them needs all ranks")
        if not snapshots.has_finite_weights(pl_module):
            raise snapshots.CannotSaveError("the weights are not finite")
        if self._before_validation is not None:
            snapshots.take_averages_back(trainer, self._before_validation)
        busy = f"another rank did not end its rescue in {_LOCK_SECONDS:g} s"
        with locked(self.folder, busy, wait_seconds=_LOCK_SECONDS, name=".rescue.lock"):
            with contextlib.suppress(FileNotFoundError, files.DamagedCheckpointError):
                files.verify(path)
                return snapshot.global_step, path
            # Not trainer.save_checkpoint: it ends with a barrier, and only rank 0 writes, which may be dead.
            self._written = snapshot
            try:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            finally:
                self._written = None
            checkpoint["global_step"] = snapshot.global_step
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
            files.remove_older(self.folder, self.keep)
        return snapshot.global_step, path
