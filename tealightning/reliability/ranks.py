"""What the ranks of a run tell each other: objects, the result of rank 0, and a heartbeat that names a failed rank."""

import json
import math
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tealightning.errors import UserError

T = TypeVar("T")
_ANSWER_SECONDS = 10.0  # of the store
_REPORT_SECONDS = 3.0  # to tell all ranks of a failure
_END_SECONDS = 15.0  # for the ranks that this process started
_RANKS_PER_SECOND = 32  # more ranks tell less often: they all ask one store
_MOST_NAMED = 16  # ranks in a message


def over_ranks(mine: T) -> list[T]:
    """What every rank has; a call of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def is_rank_zero() -> bool:
    """Whether this process acts for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(action: Callable[[], T]) -> T:
    """The result of `action`, which runs on rank 0 between two barriers: no rank is before this call while it runs,
    and none goes on until it has ended. If it raises on rank 0, every rank raises."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError("A rollout engine that serves several ranks was used before their process group exists.")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    dist.barrier()
    outcome: list[Any] = [None, None]  # result, error
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
        raise UserError(f"Rank 0 failed: {outcome[1]}")
    return outcome[0]


@dataclass(kw_only=True, slots=True)
class RankState:
    """The last that was heard of a rank: what it does, and whether that takes too long."""

    message: dict[str, Any] = field(default_factory=lambda: {"text": "starting", "is_late": False})
    at: float = field(default_factory=time.monotonic)  # here, when the message last changed


class RankHeartbeat(threading.Thread):
    """Tells the other ranks of a run what this one does, hears it of them, and finds out which of them has failed.

    It goes through the store that the ranks met in (`MASTER_ADDR`, `MASTER_PORT`), in a thread of its own, because a
    call to a store that hangs cannot be interrupted. Keys begin with `prefix`, another for each use. `children` are the
    processes of the ranks that this process has started: `rank + 1`, ...
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        prefix: str = "",
        silent_seconds: float = math.inf,
        children: Sequence["subprocess.Popen[Any]"] = (),
    ) -> None:
        super().__init__(name="tealightning heartbeat", daemon=True)
        self.rank, self.world_size = rank, world_size
        self.others = {other: RankState() for other in range(world_size) if other != rank}
        self.is_leaving = False  # all has gone well, and the others may go: that is no fault
        self.silent_seconds, self._prefix, self._children = silent_seconds, prefix, children
        self.interval = max(0.5, world_size / _RANKS_PER_SECOND)
        self.message = RankState().message  # for the others
        self._report: str | None = None  # our failure, to be sent
        self._reported: str | None = None  # the first failure that another rank has reported
        self._is_store_lost = False  # and so is the process that kept it
        self._sent, self._stopped = threading.Event(), threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(_ANSWER_SECONDS + self.interval)

    def report(self, failure: str) -> None:
        """Tell all ranks that this one failed, unless another has said so before; waits until it is said."""
        self._report = failure
        if self.is_alive():
            self._sent.wait(_REPORT_SECONDS + self.interval)

    def end_children(self) -> None:
        """Let the ranks that this process started end, and kill those that do not."""
        deadline = time.monotonic() + _END_SECONDS
        for process in self._children:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def are_late(self) -> bool:
        """Whether none of the others is within its limits."""
        return all(state.message["is_late"] for state in self.others.values())

    def last_words(self) -> str:
        """What the others were doing, in sentences."""
        return "".join(f" Rank {rank} was {self._last_word(rank)}." for rank in list(self.others)[:_MOST_NAMED])

    def fault(self, silent_seconds: float | None = None) -> str | None:
        """What one of the others has done, if one has failed: reported a failure, died, or fallen silent."""
        if self.is_leaving:
            return None
        if self._reported is not None:
            return self._reported
        for rank, process in enumerate(self._children, self.rank + 1):
            if code := process.poll():  # 0 is that of one that was asked to stop
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"Rank {rank} (process {process.pid}) {how}; it was {self._last_word(rank)}."
        if self._is_store_lost:
            return f"Rank 0, or the launcher that the ranks meet at, is gone; rank 0 was {self._last_word(0)}."
        limit, why = self.silent_seconds, f" (deadlines.silent_seconds={self.silent_seconds:g})"
        if silent_seconds is not None:
            limit, why = silent_seconds, ""
        rank = min(self.others, key=lambda other: self.others[other].at, default=self.rank)
        if self.others and (silent := time.monotonic() - self.others[rank].at) > limit:
            return f"Rank {rank} has given no sign of life for {silent:.0f} s{why}; it was {self._last_word(rank)}."
        return None

    def _last_word(self, rank: int) -> str:
        return f"last heard of while {self.others.get(rank, RankState()).message['text']}"

    def run(self) -> None:
        try:
            meeting = rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=_ANSWER_SECONDS))
            store = dist.PrefixStore(f"tealightning/{self._prefix}", next(meeting)[0])
        except dist.DistError as error:
            warnings.warn(f"deadlines: the other ranks cannot be watched ({error}).", stacklevel=1)
            self.others = {}
            return
        try:
            self._exchange(store)
            while not self._stopped.wait(self.interval):
                self._exchange(store)
        except dist.DistNetworkError:
            self._is_store_lost = not self.is_leaving and not self._stopped.is_set()

    def _exchange(self, store: dist.Store) -> None:
        try:
            # The time makes every message differ from the one before: it is what shows that this rank lives.
            store.set(str(self.rank), json.dumps(self.message | {"time": time.time()}))
            if self._report is not None:
                store.compare_set("failure", "", json.dumps([self.rank, self._report]))
                self._report = None
                self._sent.set()
            if store.check(["failure"]):
                rank, failure = json.loads(store.get("failure"))
                self._reported = failure if rank != self.rank else None
            keys = [str(rank) for rank in self.others]
            if store.check(keys):
                for state, text in zip(self.others.values(), store.multi_get(keys), strict=True):
                    if (message := json.loads(text)) != state.message:
                        state.message, state.at = message, time.monotonic()
        except dist.DistStoreError:
            return  # no answer in time: what is not heard is silence, and judged as that
