"""Run an action on rank 0 for all ranks, which share its result or its error."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankZeroError(RuntimeError):
    """Rank 0 failed, and this rank ends with it."""


def is_rank_zero() -> bool:
    """Whether this process acts for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(action: Callable[[], T]) -> T:
    """The result of `action`, which runs on rank 0 between two barriers: no rank is before this call while it runs,
    and none goes on until it has ended. If it raises on rank 0, every rank raises.

    Raises:
        RankZeroError: on the other ranks if `action` failed.
        RuntimeError: if ranks were launched that have no process group yet.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RuntimeError("A rollout engine that serves several ranks was used before their process group exists.")
        return action()
    if dist.get_world_size() == 1:
        return action()
    dist.barrier()
    outcome: list[object] = [None, None]  # result, error
    failure: Exception | None = None
    if is_rank_zero():
        try:
            outcome[0] = action()
        except Exception as error:  # whatever it is: the other ranks would wait for ever
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RankZeroError(f"Rank 0 failed: {outcome[1]}")
    return outcome[0]  # type: ignore[return-value]
