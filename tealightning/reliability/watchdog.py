"""Watchdog thread: ends a process that hangs, or whose fellow ranks have died."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerStatus

from tealightning.reliability.progress import (
    Activity,
    ThreadProgress,
    current,
    is_process_ending,
    set_default,
    set_listener,
)
from tealightning.reliability.rank_heartbeat import RankHeartbeat

EXIT_CODE = 75  # "temporary failure" (sysexits.h): starting it again goes on
SETTINGS = {
    Activity.LOADING: "load_seconds",
    Activity.STARTING: "start_seconds",
    Activity.SYNCING: "sync_seconds",
    Activity.GENERATING: "generate_seconds",
    Activity.SCORING: "score_seconds",
    Activity.TRAINING: "train_seconds",
    Activity.SAVING: "save_seconds",
    Activity.OTHER: "other_seconds",
    Activity.CLOSING: "exit_seconds",
}
"""Of each activity, the setting of `deadlines` that limits it."""
_TICK_SECONDS = 0.5
_RAISE_SECONDS = 10.0  # for the main thread to take notice; then it is stuck in C code
_END_SECONDS = 120.0  # for the main thread to handle what was raised in it
_ALONE = (Activity.GENERATING, Activity.SCORING)  # in these no rank waits for another


class RunEnded(RuntimeError):
    """The run cannot go on: an activity hangs, or another rank has failed."""

    exit_code = EXIT_CODE


class Watchdog(threading.Thread):
    """Watches the run from `start` to `stop`. A fault is first raised in the main thread, so that the run ends in good
    order; a main thread that does not take notice, or does not get to an end, is ended with the whole process.

    A process that is stuck in C code with Python's lock, so that not even this thread runs, is ended by a timer of
    `faulthandler`, with the stacks of all threads and exit code 1. There is one such timer in a process.

    To be made in the main thread; in another one nothing can be raised, and the process is ended at once.

    Args:
        trainer: The trainer whose run is watched.
        limits: Seconds that each activity may go without progress; None = no limit.
        ranks: The heartbeat of the ranks; None where there is only one.
    """

    def __init__(
        self, trainer: pl.Trainer, limits: Mapping[Activity, float | None], ranks: RankHeartbeat | None = None
    ) -> None:
        super().__init__(name="tealightning watchdog", daemon=True)
        self.trainer = trainer
        self.limits = limits
        self.ranks = ranks
        self.fault: str | None = None
        self._who = "The run" if ranks is None else f"Rank {trainer.global_rank}"
        self._state = self._watch
        self._state_since = time.monotonic()
        self._failed_in: Activity | None = None  # what the main thread did when it came to an end
        self._stopped = threading.Event()
        self._main = threading.main_thread()
        self._handler: Any = None
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # by number: what replaced `sys.stderr` may have none
        if threading.current_thread() is self._main:
            self._handler = signal.signal(signal.SIGUSR2, self._on_signal)
        set_listener(self._on_change)

    # ---------------------------------------------------------------- called by the main thread

    def closing(self, raised_in: Activity | None = None) -> Activity:
        """Expect an exception to be handled within `limits[CLOSING]`; the activity that it was raised in."""
        self._failed_in = raised_in or self._failed_in or self._progress().activity
        if self._state != self._watch_closing:
            set_default(Activity.CLOSING, self._main.ident)
            self._enter(self._watch_closing)
        return self._failed_in

    def handled(self) -> None:
        """Expect the process to be left, if its entry point has returned."""
        self._enter(self._watch_exit)

    def stop(self) -> None:
        """End the watch: all went well."""
        set_listener(None)
        self._stopped.set()
        if self.is_alive():
            self.join(10)
        if self._handler is not None:  # now that no signal will come
            signal.signal(signal.SIGUSR2, self._handler)
        if self.ranks is not None:
            self.ranks.stop()
        faulthandler.cancel_dump_traceback_later()

    def cause(self, wait_seconds: float) -> str | None:
        """What another rank did, if one has failed; waits for the news."""
        deadline = time.monotonic() + wait_seconds
        while self.ranks is not None:
            fault = self.ranks.fault()
            if fault is not None or time.monotonic() > deadline:
                return self._with_mine(fault or self.ranks.missing())
            time.sleep(0.1)
        return None

    def _on_change(self) -> None:
        """Set the timer before the main thread can get stuck, with Python's lock, in what it begins."""
        if threading.current_thread() is self._main and self._state == self._watch:
            self._set_timer(self._progress())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.fault is not None and self._state == self._watch_raised:
            raise RunEnded(self.fault)

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        while not self._stopped.wait(_TICK_SECONDS):
            self._state()

    def _enter(self, state: Any) -> None:
        self._state, self._state_since = state, time.monotonic()

    def _watch(self) -> None:
        if self._is_failing():
            self.closing()
            return
        mine, late = self._progress(), self._late()
        if self.ranks is not None:
            self.ranks.tell(f"{mine.activity} for {mine.seconds:.0f} s", is_late=late is not None)
        self._set_timer(mine)
        fault = self._with_mine(self.ranks.fault()) if self.ranks is not None else None
        if fault is None and late is not None and self._is_stuck(late):
            faulthandler.dump_traceback(file=2)
            fault = self._describe(late)
        if fault is not None:
            self._raise(fault)

    def _watch_raised(self) -> None:
        if self._is_failing():
            self.closing()
        elif self._handler is None or time.monotonic() - self._state_since > _RAISE_SECONDS:
            self.exit_now("The main thread does not react")

    def _watch_closing(self) -> None:
        mine = self._progress()
        self._set_timer(mine)
        limit = self.limits[mine.activity]
        if limit is not None and mine.seconds > limit:
            self.exit_now(f"{self._who} was {mine.activity} for {mine.seconds:.0f} s", with_stacks=True)
        if self.trainer.state.stage is None:  # the trainer is done with the exception
            self.handled()

    def _watch_exit(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if not is_process_ending():
            self._state_since = time.monotonic()
        elif time.monotonic() - self._state_since > (self.limits[Activity.CLOSING] or 30.0):
            self.exit_now("Its threads do not end", with_stacks=True)

    def exit_now(self, why: str, *, with_stacks: bool = False) -> None:
        """End the process without its consent, after saving what the main thread cannot save any more."""
        if with_stacks:
            faulthandler.dump_traceback(file=2)
        self.say(f"{why}: it is ended now.")
        _end_unless_called_again(self.limits[Activity.SAVING])
        try:
            if self._state != self._watch_exit and self._failed_in != Activity.SAVING:  # done, or stuck in it
                for callback in self.trainer.checkpoint_callbacks:
                    callback.on_exception(self.trainer, self.trainer.lightning_module, RunEnded(self.fault or why))
        except Exception as error:  # whatever it is: the process has to end
            self.say(f"Nothing could be saved: {type(error).__name__}: {error}")
        if self.ranks is not None:
            self.ranks.end_children()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    # ---------------------------------------------------------------- faults

    def _is_failing(self) -> bool:
        """Whether the trainer handles an exception."""
        return self.trainer.state.status == TrainerStatus.INTERRUPTED

    def _raise(self, fault: str) -> None:
        self.fault, self._failed_in = fault, self._progress().activity
        self.say(fault)
        if self.ranks is not None:
            self.ranks.report(fault)
        _end_unless_called_again(_END_SECONDS)
        if self._state != self._watch or self._is_failing():  # it comes to an end by itself
            return
        self._enter(self._watch_raised)
        if self._handler is not None:
            signal.pthread_kill(self._main.ident or 0, signal.SIGUSR2)

    def _with_mine(self, fault: str | None) -> str | None:
        """A fault of another rank, and what this one was doing."""
        mine = self._failed_in or self._progress().activity
        return None if fault is None else f"{fault} {self._who} was {mine} ({self._step()})."

    def _progress(self) -> ThreadProgress:
        """What the main thread does."""
        return current().get(self._main.ident or 0, ThreadProgress(activity=Activity.OTHER, seconds=0.0))

    def _late(self) -> ThreadProgress | None:
        """What a thread does that is over its limit: the one that is over it by most."""
        over = [
            (doing.seconds - limit, doing)
            for doing in current().values()
            if (limit := self.limits[doing.activity]) is not None and doing.seconds > limit
        ]
        return max(over, key=lambda pair: pair[0])[1] if over else None

    def _is_stuck(self, late: ThreadProgress) -> bool:
        """A rank that waits for others is not stuck while one of them works within its own limits."""
        return self.ranks is None or late.activity in _ALONE or self.ranks.are_late()

    def _describe(self, late: ThreadProgress) -> str:
        others = "" if self.ranks is None else self.ranks.last_words()
        return (
            f"{self._who} made no progress for {late.seconds:.0f} s while {late.activity} "
            f"(deadlines.{SETTINGS[late.activity]}={self.limits[late.activity]:g}; {self._step()}).{others}"
        )

    def _step(self) -> str:
        return f"optimizer step {self.trainer.global_step}"

    def _set_timer(self, mine: ThreadProgress) -> None:
        """Have the process end if this thread does not run again in time, because something holds Python's lock."""
        limit = self.limits[mine.activity]
        _end_unless_called_again(None if limit is None else max(0.0, limit - mine.seconds) + _RAISE_SECONDS)

    def say(self, text: str) -> None:
        """Write to stderr."""
        print(f"tealightning: {text}", file=sys.stderr, flush=True)


def _end_unless_called_again(seconds: float | None) -> None:
    """Set `faulthandler`'s timer; None = no limit."""
    if seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        with contextlib.suppress(OverflowError):  # years
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
