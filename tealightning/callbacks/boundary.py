"""What a run was like between two steps: what a checkpoint holds beside weights and optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import lightning.pytorch as pl
import torch.distributed as dist

from tealightning.callbacks.random_state import random_state

T = TypeVar("T")
RANKS = "tealightning_ranks"
"""Key in a checkpoint: the state of each rank, a list."""


@runtime_checkable
class HasRankState(Protocol):
    """A callback with a state that differs between ranks; of `state_dict` a checkpoint holds rank 0's alone."""

    state_key: str

    def rank_state_dict(self, *, of_step_under_way: bool = False, wait: bool = True) -> dict[str, Any]: ...

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(kw_only=True, slots=True)
class Boundary:
    """Positions and counters as they are after a step. Weights and optimizer are not copied: they stay what they are
    until the next optimizer step begins."""

    global_step: int  # optimizer steps
    batches: int  # training batches whose step was completed
    loops: dict[str, Any]  # of Lightning's fit loop, with the position in the order of prompts
    callbacks: dict[str, dict[str, Any]]  # by state key
    datamodule: dict[str, Any]
    ranks: list[dict[str, Any]] = field(default_factory=list)  # random streams of every rank

    def put_into(self, checkpoint: dict[str, Any], datamodule: Any) -> None:
        """Replace what the checkpoint says of a later moment, such as one in the middle of a step."""
        checkpoint["loops"]["fit_loop"] = self.loops
        checkpoint["callbacks"] = self.callbacks
        if self.datamodule:
            checkpoint[type(datamodule).__qualname__] = self.datamodule


def boundary_of(trainer: pl.Trainer, ranks: list[dict[str, Any]]) -> Boundary:
    """The boundary at which the trainer is now."""
    states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return Boundary(
        global_step=trainer.global_step,
        batches=completed_batches(trainer),
        loops=detached(trainer.fit_loop.state_dict()),
        callbacks=detached({key: state for key, state in states.items() if state}),
        datamodule=detached(datamodule.state_dict()) if datamodule is not None else {},
        ranks=ranks,
    )


def before_validation(boundary: Boundary) -> Boundary:
    """The boundary as Lightning knows one in the middle of a validation, none of whose batches is done: a resumed run
    then starts with that validation, which it would otherwise skip."""
    progress = boundary.loops["epoch_loop.val_loop.batch_progress"]
    progress["total"]["ready"] += 1
    progress["total"]["started"] += 1
    return boundary


def completed_batches(trainer: pl.Trainer) -> int:
    """Training batches, over all epochs, whose `training_step` has returned."""
    return _batches(trainer)["processed"]


def is_in_a_step(trainer: pl.Trainer) -> bool:
    """Whether a training batch was taken whose `training_step` has not returned."""
    return _batches(trainer)["ready"] != _batches(trainer)["processed"]


def _batches(trainer: pl.Trainer) -> dict[str, int]:
    return trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()


def rank_state(trainer: pl.Trainer, **which: bool) -> dict[str, Any]:
    """This rank's: random streams, and what callbacks keep of their own."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, HasRankState)]  # type: ignore[attr-defined]
    kept = {callback.state_key: callback.rank_state_dict(**which) for callback in callbacks}
    return {"random": random_state(), "callbacks": {key: state for key, state in kept.items() if state}}


def over_ranks(mine: T) -> list[T]:
    """What every rank has; a call of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def detached(value: Any) -> Any:
    """A copy of nested dictionaries and lists; what is in them is the same."""
    copied: dict[type, Callable[[Any], Any]] = {
        dict: lambda mapping: {key: detached(inner) for key, inner in mapping.items()},
        list: lambda items: [detached(inner) for inner in items],
    }
    return copied.get(type(value), lambda other: other)(value)
