"""Snapshot of a run between two steps: what a checkpoint holds beside weights and optimizer."""

import random
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.distributed.tensor import DTensor

from tealightning.reliability.fingerprint import fingerprint

RANKS = "tealightning_ranks"
"""Key in a checkpoint: the state of each rank, a list."""


def random_state() -> dict[str, Any]:
    """States of the streams of Python, numpy, torch and, where there are any, of CUDA devices."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],  # a list: loading with weights_only refuses arrays
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue the streams from what `random_state` gave; of CUDA, those of the devices that there are."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, stream in list(enumerate(state["cuda"]))[: torch.cuda.device_count()]:
            torch.cuda.set_rng_state(stream, device)


def callbacks_with_rank_state(trainer: Any) -> list[Any]:
    """Callbacks whose state differs between ranks (`rank_state_dict`, `load_rank_state_dict`): of `state_dict` a
    checkpoint holds rank 0's alone."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "rank_state_dict")]


def rank_state(trainer: pl.Trainer, **options: bool) -> dict[str, Any]:
    callbacks = callbacks_with_rank_state(trainer)
    states = {callback.state_key: callback.rank_state_dict(**options) for callback in callbacks}
    return {"random": random_state(), "callbacks": {key: state for key, state in states.items() if state}}


@dataclass(kw_only=True, slots=True)
class StepSnapshot:
    """Positions and counters as they are after a step. Weights and optimizer are not copied: they stay what they are
    until the next optimizer step begins."""

    global_step: int  # optimizer steps
    batches: int  # training batches, over all epochs, whose `training_step` has returned
    loops: dict[str, Any]  # of Lightning's fit loop, with the position in the order of prompts
    callbacks: dict[str, dict[str, Any]]  # by state key
    datamodule: dict[str, Any]
    ranks: list[dict[str, Any]]  # random streams of every rank, and the states that its callbacks keep of their own


def take_snapshot(trainer: pl.Trainer, ranks: list[dict[str, Any]]) -> StepSnapshot:
    states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    loops = _detached(trainer.fit_loop.state_dict())
    validation = loops["epoch_loop.val_loop.batch_progress"]["total"]
    validation |= dict.fromkeys(("ready", "started", "processed"), validation["completed"])  # none is under way
    return StepSnapshot(
        global_step=trainer.global_step,
        batches=_batches(trainer)["processed"],
        loops=loops,
        callbacks=_detached({key: state for key, state in states.items() if state}),
        datamodule=_detached(datamodule.state_dict()) if datamodule is not None else {},
        ranks=ranks,
    )


def _batches(trainer: pl.Trainer) -> dict[str, int]:
    """Training batches, over all epochs: `ready` to be trained on, and `processed`, whose `training_step` returned."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()


def _detached(value: Any) -> Any:
    """Copy of nested dictionaries and lists; what is in them is the same."""
    if type(value) is dict:
        return {key: _detached(inner) for key, inner in value.items()}
    return [_detached(inner) for inner in value] if type(value) is list else value


class CannotSaveError(Exception):
    """The live state is not that of a completed step; the text says why."""


def snapshot_after_error(last: StepSnapshot | None, *, is_moving: bool, trainer: pl.Trainer) -> StepSnapshot:
    """The snapshot that weights and optimizer still belong to when a run fails. Waits for no other rank.

    `last` is the newest one that was taken, `is_moving` whether an optimizer step has begun since then; a
    CannotSaveError is raised if there is none.
    """
    processed = _batches(trainer)["processed"]
    is_in_a_step = _batches(trainer)["ready"] != processed
    if is_in_a_step and is_moving:
        raise CannotSaveError("the weights are in the middle of a step")
    if last is not None and (is_in_a_step or last.batches == processed):
        callbacks = rank_state(trainer, of_step_under_way=is_in_a_step, wait=is_in_a_step)["callbacks"]
        return _with_rank(last, trainer, last.ranks[trainer.global_rank] | {"callbacks": callbacks})
    if is_in_a_step or processed == 0 or not is_moving:
        raise CannotSaveError("no step was completed since the start")
    # The step is done, and a callback failed after it.
    ranks = last.ranks if last is not None else [{}] * trainer.world_size
    return _with_rank(take_snapshot(trainer, ranks), trainer, rank_state(trainer, wait=False))


def take_averages_back(trainer: Any, before: bytes) -> None:
    """Put the weights back that an evaluation has swapped for averaged ones, if it has: `before` is their fingerprint,
    and a CannotSaveError says that they are not to be had."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging) and fingerprint(trainer.lightning_module) != before:
            callback.on_validation_epoch_end(trainer, trainer.lightning_module)
    if fingerprint(trainer.lightning_module) != before:
        raise CannotSaveError("a callback has changed the weights for an evaluation")


def _with_rank(snapshot: StepSnapshot, trainer: pl.Trainer, state: dict[str, Any]) -> StepSnapshot:
    """With the state of this rank, and of none if those of others are unknown."""
    ranks = list(snapshot.ranks)
    ranks[trainer.global_rank] = state
    return replace(snapshot, ranks=ranks if all(ranks) else [])


def mark_before_validation(snapshot: StepSnapshot) -> None:
    """Describe a snapshot as Lightning does the middle of a validation, none of whose batches is done: a resumed run
    then starts with that validation, which it would otherwise skip."""
    progress = snapshot.loops["epoch_loop.val_loop.batch_progress"]
    progress["total"] |= {"ready": progress["total"]["ready"] + 1, "started": progress["total"]["started"] + 1}


def mark_after_epoch(snapshot: StepSnapshot, trainer: pl.Trainer) -> None:
    """Describe a snapshot of the end of an epoch as the beginning of the next one. From the end Lightning would go on
    with another batch of the epoch that has ended, and all later epochs would be shifted by that."""
    loops = snapshot.loops
    epoch, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    for counts in epoch.values():
        counts["completed"] = counts["processed"]
    batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["total"] = dict.fromkeys(validation["total"], 0)
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return
    every = trainer.check_val_every_n_epoch
    by_batches = every is None and snapshot.batches % trainer.val_check_batch == 0
    if by_batches or (every is not None and (epoch["current"]["processed"] + 1) % every == 0):
        # A resumed run will find, before its first batch, that a validation is due, skip it, and count a batch.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def has_finite_weights(module: torch.nn.Module) -> bool:
    """Whether all weights are finite; of sharded ones those of this rank."""
    shares = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return all(bool(torch.isfinite(share).all()) for share in shares)


def is_ending(trainer: pl.Trainer) -> bool:
    """Whether training ends with this step (and its epoch)."""
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs  # type: ignore[operator]
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or (is_last_epoch and is_last_batch)


def will_validate(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after this step: as it decides that itself."""
    loop = trainer.fit_loop
    batches = trainer.num_val_batches
    number = sum(batches) if isinstance(batches, list) else batches
    return number > 0 and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
