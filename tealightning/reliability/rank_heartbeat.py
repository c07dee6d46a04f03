"""Heartbeat between ranks, twice a second, so that one that hangs, dies or fails can be named."""

import json
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_ANSWER_SECONDS = 10.0  # of the store
_REPORT_SECONDS = 3.0  # to tell all ranks of a failure
_RANKS_PER_SECOND = 32  # more ranks tell less often: they all ask one store
_MOST_NAMED = 16  # ranks in a message


@dataclass(kw_only=True, slots=True)
class RankState:
    """The last that was heard of a rank."""

    message: dict[str, Any] = field(default_factory=dict)  # `text`, `is_late`, `time`; empty before the first
    at: float = field(default_factory=time.monotonic)  # here, when the message last changed

    @property
    def text(self) -> str:
        """What it was doing."""
        return self.message.get("text", "starting")


class RankHeartbeat:
    """Tells the other ranks of a run what this one does, hears it of them, and finds out which of them has failed.

    It goes through the store that the ranks met in (`MASTER_ADDR`, `MASTER_PORT`), over a connection of its own and in
    a thread of its own, because a call to a store that hangs cannot be interrupted.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        name: Prefix of the keys in the store: the same on all ranks, another for each use.
        silent_seconds: Longest time without a message from a rank; None = no limit.
        children: The processes of the ranks that this process has started: `rank + 1`, `rank + 2`, ...
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        name: str,
        *,
        silent_seconds: float | None = None,
        children: Sequence["subprocess.Popen[Any]"] = (),
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.others = {other: RankState() for other in range(world_size) if other != rank}
        self.is_leaving = False  # all has gone well, and the others may go: that is no fault
        self._name = name
        self._silent_seconds = silent_seconds
        self._children = children
        self._interval = max(0.5, world_size / _RANKS_PER_SECOND)
        self._message: dict[str, Any] = {}  # for the others
        self._report: str | None = None  # our failure, to be sent
        self._reported: str | None = None  # the first failure that another rank has reported
        self._is_store_lost = False  # and so is the process that kept it
        self._wake, self._sent, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tealightning heartbeat", daemon=True)

    @staticmethod
    def is_possible() -> bool:
        """Whether there are several ranks, which met in a store that this class can find."""
        return (
            dist.is_initialized() and dist.get_world_size() > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        )

    def start(self) -> None:
        """Begin to tell and to hear."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._wake.set()
        self._thread.join(_ANSWER_SECONDS + 1)

    def tell(self, text: str, *, is_late: bool) -> None:
        """Set what the others hear next: what this rank does, and whether that takes too long."""
        self._message = {"text": text, "is_late": is_late}

    def report(self, failure: str) -> None:
        """Tell all ranks that this one failed, unless another has said so before; waits until it is said."""
        self._report = failure
        self._wake.set()
        self._sent.wait(_REPORT_SECONDS)

    def end_children(self, wait_seconds: float = 15.0) -> None:
        """Let the ranks that this process started end, and kill those that do not."""
        deadline = time.monotonic() + wait_seconds
        for process in self._children:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    # ---------------------------------------------------------------- what is known of the others

    def are_late(self) -> bool:
        """Whether none of the others is within its limits."""
        return all(state.message.get("is_late", False) for state in self.others.values())

    def last_words(self) -> str:
        """What the others were doing, in sentences."""
        return "".join(f" Rank {rank} was {self._last_word(rank)}." for rank in list(self.others)[:_MOST_NAMED])

    def missing(self) -> str | None:
        """The rank that has been silent longest, if that is longer than it should be. No fault by itself: it explains
        why a collective has failed."""
        rank = min(self.others, key=lambda other: self.others[other].at, default=None)
        if rank is None or (silent := self._silence(rank)) < 4 * self._interval:
            return None
        return f"Rank {rank} has not been heard of for {silent:.0f} s, since it was {self.others[rank].text}."

    def fault(self) -> str | None:
        """What one of the others has done, if one has failed: reported a failure, died, or fallen silent."""
        if self.is_leaving:
            return None
        return self._reported or self._dead_child() or self._silent_rank()

    def _dead_child(self) -> str | None:
        for rank, process in enumerate(self._children, self.rank + 1):
            code = process.poll()
            if code:  # 0 is that of one that was asked to stop
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"Rank {rank} (process {process.pid}) {how}; it was {self._last_word(rank)}."
        return None

    def _silent_rank(self) -> str | None:
        if self._is_store_lost:
            return f"Rank 0, or the launcher that the ranks meet at, is gone; rank 0 was {self._last_word(0)}."
        limit = self._silent_seconds
        for rank in self.others:
            if limit is not None and (silent := self._silence(rank)) > limit:
                return (
                    f"Rank {rank} has given no sign of life for {silent:.0f} s (deadlines.silent_seconds={limit:g}); "
                    f"it was {self._last_word(rank)}."
                )
        return None

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self.others[rank].at

    def _last_word(self, rank: int) -> str:
        return f"last heard of while {self.others.get(rank, RankState()).text}"

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
                self._wake.wait(self._interval)
                self._wake.clear()
        except dist.DistNetworkError:
            self._is_store_lost = not self.is_leaving and not self._stop.is_set()

    def _exchange(self, store: dist.Store) -> None:
        try:
            # The time makes every message differ from the one before: it is what shows that this rank lives.
            store.set(str(self.rank), json.dumps(self._message | {"time": time.time()}))
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
