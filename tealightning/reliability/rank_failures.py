"""Failures of other ranks: they die, fall silent, report an error, or are late as well."""

import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from tealightning.reliability.rank_heartbeat import Peers

_REPORT_SECONDS = 3.0  # to tell all ranks of a failure
_MOST_TOLD = 16  # ranks in a message


class OtherRanks:
    """The ranks of a run, as this one sees them.

    Args:
        peers: What they tell each other.
        silent_seconds: Longest time without a word from one; None = no limit.
        started: Ranks that this process has started: `rank + 1`, `rank + 2`, ...
    """

    def __init__(
        self, peers: Peers, *, silent_seconds: float | None, started: Sequence["subprocess.Popen[Any]"] = ()
    ) -> None:
        self._peers = peers
        self._silent_seconds = silent_seconds
        self._started = list(started)
        peers.start()

    def tell(self, text: str, *, is_late: bool) -> None:
        """What this one does, for the others."""
        self._peers.tell({"text": text, "is_late": is_late})

    def report(self, failure: str) -> None:
        """This one fails, and all others with it."""
        self._peers.report(failure, _REPORT_SECONDS)

    def leave(self) -> None:
        """All has gone well: from here on the others may go."""
        self._peers.is_leaving = True

    def stop(self) -> None:
        self._peers.stop()

    def end(self, wait_seconds: float = 15.0) -> None:
        """Let the ranks that this process started end, and kill those that do not."""
        deadline = time.monotonic() + wait_seconds
        for process in self._started:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def are_late(self) -> bool:
        """Whether none of them is within its limits."""
        return all(heard.state.get("is_late", False) for heard in self._peers.others.values())

    def last_words(self) -> str:
        """What they were doing."""
        told = [f" Rank {rank} was {self.last_word(rank)}." for rank in list(self._peers.others)[:_MOST_TOLD]]
        return "".join(told)

    def last_word(self, rank: int) -> str:
        """What one was doing."""
        return f"last heard of while {self._phase_of(rank)}"

    def _phase_of(self, rank: int) -> str:
        heard = self._peers.others.get(rank)
        return heard.state.get("text", "starting") if heard is not None else "starting"

    def missing(self) -> str | None:
        """The rank that has been silent longest, if that is longer than it should be. No fault by itself: it explains
        why a collective has failed."""
        silent = {rank: self._peers.silent_seconds(rank) for rank in self._peers.others}
        rank = max(silent, key=lambda r: silent[r], default=0)
        if silent.get(rank, 0.0) < 4 * self._peers.interval:
            return None
        return f"Rank {rank} has not been heard of for {silent[rank]:.0f} s, since it was {self._phase_of(rank)}."

    # ---------------------------------------------------------------- faults

    def fault(self) -> str | None:
        """What one of them has done, if one has failed."""
        return None if self._peers.is_leaving else self._dead() or self._reported() or self._lost()

    def _dead(self) -> str | None:
        for rank, process in enumerate(self._started, self._peers.rank + 1):
            code = process.poll()
            if code:  # 0 is that of one that was asked to stop
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                reported = self._reported()
                return reported or f"Rank {rank} (process {process.pid}) {how}; it was {self.last_word(rank)}."
        return None

    def _reported(self) -> str | None:
        failure = self._peers.failure
        return failure[1] if failure is not None and failure[0] != self._peers.rank else None

    def _lost(self) -> str | None:
        if self._peers.is_lost:
            return f"Rank 0, or the launcher that the ranks meet at, is gone; rank 0 was {self.last_word(0)}."
        limit = self._silent_seconds
        for rank in self._peers.others:
            silent = self._peers.silent_seconds(rank)
            if limit is not None and silent > limit:
                return (
                    f"Rank {rank} has given no sign of life for {silent:.0f} s (deadlines.silent_seconds={limit:g}); "
                    f"it was {self.last_word(rank)}."
                )
        return None
