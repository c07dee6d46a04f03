"""Save the last completed step of a run that ends by an exception.

Nothing here waits for other ranks, which may be dead or wait for this one. Every rank that lives comes here at a moment
of its own; the first writes, the others wait for it and find its file.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from tealightning.reliability.checkpoint_files import (
    DamagedCheckpointError,
    checkpoint_file,
    newest_good,
    remove_older,
    verify,
)
from tealightning.reliability.locks import locked
from tealightning.reliability.step_snapshot import (
    Boundary,
    boundary_of,
    completed_batches,
    has_finite_weights,
    is_in_a_step,
    rank_state,
)

if TYPE_CHECKING:
    from tealightning.reliability.checkpoint import ResumableCheckpoint

_LOCK_SECONDS = 300.0


class _CannotSaveError(Exception):
    """The live state is not that of a completed step; the text says why."""


def after(exception: BaseException, saver: "ResumableCheckpoint", trainer: pl.Trainer, pl_module: Any) -> str:
    """Save what can be saved, and say how to go on. Raises nothing: the exception at hand is the one to be seen."""
    path: Path | None
    try:
        step, path = _saved(saver, trainer, pl_module)
        what = f"Step {step} is saved in {path}."
    except _CannotSaveError as error:
        path, what = _newest(saver, trainer), f"Nothing was saved: {error}."
    except Exception as error:  # whatever it is: it must not take the place of the error that ended the run
        path, what = _newest(saver, trainer), f"The last step could not be saved: {type(error).__name__}: {error}."
    if path is None:
        return f"{what} There is no checkpoint of this run yet."
    command = saver.resume_command or f"trainer.fit(..., ckpt_path={str(path)!r})"
    newest = "" if str(path) in what else f" The newest checkpoint is {path}."
    return f"{what}{newest} To go on:\n  {command}"


def _saved(saver: "ResumableCheckpoint", trainer: pl.Trainer, pl_module: Any) -> tuple[int, Path]:
    """The last completed (optimizer) step and its checkpoint, which is written if there is none yet."""
    boundary = _boundary(saver, trainer)
    assert saver.folder is not None
    path = checkpoint_file(saver.folder, boundary.global_step)
    if saver.saved == path:
        return boundary.global_step, path
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise _CannotSaveError("the weights are sharded, and gathering them needs all ranks")
    if not has_finite_weights(pl_module):
        raise _CannotSaveError("the weights are not finite")
    busy = f"another rank did not end its rescue in {_LOCK_SECONDS:g} s"
    with locked(saver.folder, busy, wait_seconds=_LOCK_SECONDS, name=".rescue.lock"):
        if not _is_good(path):
            _write(boundary, path, saver, trainer)
            remove_older(saver.folder, saver.keep)
    return boundary.global_step, path


def _boundary(saver: "ResumableCheckpoint", trainer: pl.Trainer) -> Boundary:
    """The boundary that weights and optimizer are still at."""
    if is_in_a_step(trainer):
        if saver.is_moving:
            raise _CannotSaveError("the weights are in the middle of a step")
        if saver.boundary is None:
            raise _CannotSaveError("no step was completed since the start")
        return _with_own_state(saver.boundary, trainer, of_step_under_way=True, random=False)
    if saver.boundary is not None and saver.boundary.batches == completed_batches(trainer):
        return _with_own_state(saver.boundary, trainer, wait=False, random=False)
    if completed_batches(trainer) == 0 or not saver.is_moving:
        raise _CannotSaveError("no step was completed since the start")
    # The step is done, and a callback failed after it.
    others = saver.boundary.ranks if saver.boundary is not None else [{}] * trainer.world_size
    return _with_own_state(boundary_of(trainer, others), trainer, wait=False, random=True)


def _with_own_state(boundary: Boundary, trainer: pl.Trainer, *, random: bool, **which: bool) -> Boundary:
    """With what callbacks of this rank keep of their own, and, if `random`, its random streams as they are now."""
    mine, ranks = rank_state(trainer, **which), list(boundary.ranks)
    ranks[trainer.global_rank] = mine if random else ranks[trainer.global_rank] | {"callbacks": mine["callbacks"]}
    complete = ranks if all(ranks) else []
    return replace(boundary, ranks=complete)


def _write(boundary: Boundary, path: Path, saver: "ResumableCheckpoint", trainer: pl.Trainer) -> None:
    # Not trainer.save_checkpoint: it ends with a barrier, and writes on rank 0 alone, which may be the dead one.
    saver.rescued = boundary
    try:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint | {"global_step": boundary.global_step}, path)
    finally:
        saver.rescued = None


def _newest(saver: "ResumableCheckpoint", trainer: pl.Trainer) -> Path | None:
    newest = newest_good(saver.folder, lambda damaged: None) if saver.folder is not None else None
    return newest or (Path(trainer.ckpt_path) if trainer.ckpt_path else None)


def _is_good(path: Path) -> bool:
    try:
        return path.exists() and verify(path) is not None
    except DamagedCheckpointError:
        return False
