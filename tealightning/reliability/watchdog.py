"""Watchdog thread: ends a process that hangs, or whose fellow ranks have died."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tealightning.reliability.guard import Guard
from tealightning.reliability.progress import SETTINGS, Doing, RunPhase, current, listen, owns_process, set_ground
from tealightning.reliability.rank_failures import OtherRanks

EXIT_CODE = 75  # "temporary failure" (sysexits.h): starting it again goes on
_TICK_SECONDS = 0.5
_RAISE_SECONDS = 10.0  # for the main thread to take notice; then it is stuck in C code
_ALONE = (RunPhase.GENERATING, RunPhase.SCORING)  # in these no rank waits for another


class RunEnded(RuntimeError):
    """The run cannot go on: a phase hangs, or another rank has failed."""

    exit_code = EXIT_CODE


@dataclass(kw_only=True, slots=True)
class Surroundings:
    """What a watch knows of its process."""

    who: str  # "Rank 1", or "The run" where there is only one
    limits: dict[RunPhase, float | None]  # seconds without progress
    step: Callable[[], str]  # where the run is, in words
    rescue: Callable[[str], None]  # saves what can be saved after a fault, from this thread
    is_failing: Callable[[], bool]  # whether the trainer handles an exception
    is_handled: Callable[[], bool]  # whether it is done with that


class Watch(threading.Thread):
    """From `start` to `stop`. A fault is first raised in the main thread, so that the run ends in good order; a main
    thread that does not take notice, or does not get to an end, is ended with the whole process.

    To be made in the main thread; in another one nothing can be raised, and the process is ended at once.
    """

    def __init__(self, surroundings: Surroundings, ranks: OtherRanks | None) -> None:
        super().__init__(name="tealightning watch", daemon=True)
        self.around = surroundings
        self.ranks = ranks
        self.fault: str | None = None
        self._ended_at = 0.0  # when the fault was raised
        self._state = self._watch
        self._exiting_since: float | None = None
        self._failed_in: RunPhase | None = None  # what the main thread did when it came to an end
        self._stopped = threading.Event()
        self._guard = Guard()
        self._stop_listening = listen(self._on_change)
        self._main = threading.main_thread()
        self._handler: Any = None
        if threading.current_thread() is self._main:
            self._handler = signal.signal(signal.SIGUSR2, self._on_signal)

    # ---------------------------------------------------------------- called by the main thread

    def closing(self, raised_in: RunPhase | None = None) -> RunPhase:
        """An exception is being handled, which takes `limits[CLOSING]` at most; the phase that it was raised in."""
        self._failed_in = raised_in or self._failed_in or self._doing().phase
        if self._state != self._watch_closing:
            set_ground(RunPhase.CLOSING, self._main.ident)
            self._state = self._watch_closing
        return self._failed_in

    def handled(self) -> None:
        """What is left is to leave the process, if it is left."""
        self._state = self._watch_exit

    def stop(self) -> None:
        """All went well."""
        self._stop_listening()
        self._stopped.set()
        if self.is_alive():
            self.join(10)
        if self._handler is not None:  # now that no signal will come
            signal.signal(signal.SIGUSR2, self._handler)
        if self.ranks is not None:
            self.ranks.stop()
        self._guard.stop()

    def cause(self, wait_seconds: float) -> str | None:
        """What another rank did, if one has failed; waits for the news."""
        deadline = time.monotonic() + wait_seconds
        while True:
            found = self._fault_of_others()
            if found is not None or time.monotonic() > deadline or self.ranks is None:
                break
            time.sleep(0.1)
        missing = None if self.ranks is None else self.ranks.missing()
        return found or self._with_mine(missing)

    def _on_change(self) -> None:
        """The guard knows what the main thread does before it can get stuck in it with the interpreter's lock."""
        if threading.current_thread() is self._main and self._state == self._watch:
            self._expect(self._doing())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.fault is not None and self._state == self._watch_raised:
            raise RunEnded(self.fault)

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        while not self._stopped.wait(_TICK_SECONDS):
            self._state()

    def _watch(self) -> None:
        if self.around.is_failing():
            self.closing()
            return
        mine, late = self._doing(), self._late()
        self._tell(mine, is_late=late is not None)
        self._expect(mine)
        fault = self._fault_of_others()
        if fault is None and late is not None and self._is_stuck(late):
            self._print_stacks()
            fault = self._told(late)
        if fault is not None:
            self._raise(fault)

    def _watch_raised(self) -> None:
        if self.around.is_failing():
            self.closing()
        elif time.monotonic() - self._ended_at > _RAISE_SECONDS:
            self.exit_now("The main thread does not react")

    def _watch_closing(self) -> None:
        mine = self._doing()
        self._expect(mine)
        limit = self.around.limits[mine.phase]
        if limit is not None and mine.seconds > limit:
            self._print_stacks()
            self.exit_now(f"{self.around.who} was {mine.phase} for {mine.seconds:.0f} s")
        if self.around.is_handled():
            self.handled()

    def _watch_exit(self) -> None:
        self._guard.expect(None, "")
        # Before the main thread has ended it joins the threads of executors, which nothing public tells.
        is_ending = not self._main.is_alive() or getattr(threading, "_SHUTTING_DOWN", False)
        if not (is_ending and owns_process()):
            return
        now = time.monotonic()
        self._exiting_since = self._exiting_since or now
        if now - self._exiting_since > (self.around.limits[RunPhase.CLOSING] or 30.0):
            self._print_stacks()
            self.exit_now("Its threads do not end")

    def exit_now(self, why: str) -> None:
        """End the process without its consent."""
        self.say(f"{why}: it is ended now.")
        self._guard.expect(self.around.limits[RunPhase.SAVING], f"{self.around.who} could not save in time: killed.")
        try:
            if self._state != self._watch_exit and self._failed_in != RunPhase.SAVING:  # done, or stuck in it
                self.around.rescue(self.fault or why)
        except Exception as error:  # whatever it is: the process has to end
            self.say(f"Nothing could be saved: {type(error).__name__}: {error}")
        if self.ranks is not None:
            self.ranks.end()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    # ---------------------------------------------------------------- faults

    def _raise(self, fault: str) -> None:
        self.fault, self._failed_in = fault, self._doing().phase
        self.say(fault)
        if self.ranks is not None:
            self.ranks.report(fault)
        self._guard.expect(120.0, f"{self.around.who} could not end itself: killed.")
        if self._state != self._watch or self.around.is_failing():  # it comes to an end by itself
            return
        self._state, self._ended_at = self._watch_raised, time.monotonic()
        if self._handler is None:
            self._ended_at -= _RAISE_SECONDS
        else:
            signal.pthread_kill(self._main.ident or 0, signal.SIGUSR2)

    def _fault_of_others(self) -> str | None:
        """What another rank has done, if it has failed; and what this one was doing."""
        found = None if self.ranks is None else self.ranks.fault()
        return self._with_mine(found)

    def _with_mine(self, found: str | None) -> str | None:
        mine = self._failed_in or self._doing().phase
        return None if found is None else f"{found} {self.around.who} was {mine} ({self.around.step()})."

    # ---------------------------------------------------------------- lateness

    def _doing(self) -> Doing:
        """The main thread's phase."""
        return current().get(self._main.ident or 0, Doing(phase=RunPhase.OTHER, seconds=0.0))

    def _late(self) -> Doing | None:
        """A thread's phase that is over its limit: the one that is over it by most."""
        limits = self.around.limits
        over = [(d.seconds - limit, d) for d in current().values() if (limit := limits[d.phase]) is not None]
        worst = max(over, key=lambda pair: pair[0], default=None)
        return worst[1] if worst is not None and worst[0] > 0 else None

    def _is_stuck(self, late: Doing) -> bool:
        """A rank that waits for others is not stuck while one of them works within its own limits."""
        return self.ranks is None or late.phase in _ALONE or self.ranks.are_late()

    def _told(self, late: Doing) -> str:
        limit = self.around.limits[late.phase]
        others = "" if self.ranks is None else self.ranks.last_words()
        return (
            f"{self.around.who} made no progress for {late.seconds:.0f} s while {late.phase} "
            f"(deadlines.{SETTINGS[late.phase]}={limit:g}; {self.around.step()}).{others}"
        )

    # ---------------------------------------------------------------- words

    def _tell(self, mine: Doing, *, is_late: bool) -> None:
        if self.ranks is not None:
            self.ranks.tell(f"{mine.phase} for {mine.seconds:.0f} s", is_late=is_late)

    def _expect(self, mine: Doing) -> None:
        """The guard ends this process if this thread does not run again in time, because something holds the lock."""
        limit = self.around.limits[mine.phase]
        left = None if limit is None else max(0.0, limit - mine.seconds) + _RAISE_SECONDS
        self._guard.expect(
            left,
            f"tealightning: {self.around.who} hangs while {mine.phase} ({self.around.step()}), and none of its threads "
            f"runs any more (deadlines.{SETTINGS[mine.phase]}={limit}): killed.",
        )

    def _print_stacks(self) -> None:
        faulthandler.dump_traceback(file=2, all_threads=True)

    def say(self, text: str) -> None:
        print(f"tealightning: {text}", file=sys.stderr, flush=True)
