"""Heartbeat between ranks, twice a second, so that one that hangs or dies can be named."""

import json
import os
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_ANSWER_SECONDS = 10.0  # of the store
_RANKS_PER_SECOND = 32  # more ranks tell less often: they all ask one store


@dataclass(kw_only=True, slots=True)
class Heard:
    """The last that was heard of a rank."""

    state: dict[str, Any]  # `text`, `is_late`, `host`, `pid`; empty before the first
    at: float  # `time.monotonic()` here, when it last changed


class Peers:
    """Exchanges states through the store that the ranks met in (`MASTER_ADDR`, `MASTER_PORT`), over a connection of
    its own and in a thread of its own, because a call to a store that hangs cannot be interrupted.

    Args:
        rank: Of this process.
        world_size: Number of ranks.
        name: The same on all ranks, another for each use.
    """

    def __init__(self, rank: int, world_size: int, name: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self.others = {r: Heard(state={}, at=time.monotonic()) for r in range(world_size) if r != rank}
        self.failure: tuple[int, str] | None = None  # the first that any rank reported: (rank, what)
        self.is_lost = False  # the store is gone, and so is the process that kept it
        self.is_leaving = False  # the others may go: that is no fault
        self._name = name
        self._state: dict[str, Any] = {}
        self._report: str | None = None  # our failure, to be sent
        self.interval = max(0.5, world_size / _RANKS_PER_SECOND)
        self._wake, self._sent, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tealightning peers", daemon=True)

    @staticmethod
    def can_meet() -> bool:
        """Whether the ranks met in a store that this can find."""
        return (
            dist.is_initialized() and dist.get_world_size() > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        )

    def start(self) -> None:
        self._thread.start()

    def tell(self, state: Mapping[str, Any]) -> None:
        """What the others hear next."""
        self._state = dict(state)

    def report(self, what: str, wait_seconds: float) -> None:
        """Tell all ranks that this one failed, unless another has said so before; waits until it is said."""
        self._report = what
        self._wake.set()
        self._sent.wait(wait_seconds)

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(_ANSWER_SECONDS + 1)

    def silent_seconds(self, rank: int) -> float:
        """Since when nothing new came from a rank."""
        return time.monotonic() - self.others[rank].at

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            meeting = rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=_ANSWER_SECONDS))
            store = dist.PrefixStore(f"tealightning/{self._name}", next(meeting)[0])
        except dist.DistError as error:
            warnings.warn(f"deadlines: the other ranks cannot be watched ({error}).", stacklevel=1)
            self.others = {}
            return
        try:
            while not self._stop.is_set():
                self._exchange(store)
                self._wake.wait(self.interval)
                self._wake.clear()
        except dist.DistNetworkError:
            self.is_lost = not self.is_leaving and not self._stop.is_set()

    def _exchange(self, store: dist.Store) -> None:
        try:
            # The time makes every message differ from the one before: it is what shows that this rank lives.
            store.set(str(self.rank), json.dumps(self._state | {"time": time.time()}))
            if self._report is not None:
                store.compare_set("failure", "", json.dumps([self.rank, self._report]))
                self._report = None
                self._sent.set()
            if store.check(["failure"]):
                rank, what = json.loads(store.get("failure"))
                self.failure = (rank, what)
            keys = [str(rank) for rank in self.others]
            if store.check(keys):
                for heard, state in zip(self.others.values(), store.multi_get(keys), strict=True):
                    self._hear(heard, json.loads(state))
        except dist.DistStoreError:
            return  # no answer in time: what is not heard is silence, and judged as that

    @staticmethod
    def _hear(heard: Heard, state: dict[str, Any]) -> None:
        if state != heard.state:
            heard.state, heard.at = state, time.monotonic()
