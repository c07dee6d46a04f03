"""Deadlines: end a run that hangs or has lost a rank, instead of letting it wait for ever."""

import atexit
import faulthandler
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus

from tealightning.errors import UserError
from tealightning.reliability import progress
from tealightning.reliability.progress import Activity, activity_of, set_default
from tealightning.reliability.ranks import RankHeartbeat

EXIT_CODE = 75  # "temporary failure" (sysexits.h): starting it again goes on
NO_LIMIT = 1e9  # seconds: 30 years, which the timers take
_TICK_SECONDS = 0.5
_NEWS_SECONDS = 3.0  # for the news of which rank failed first
_RAISE_SECONDS = 10.0  # for the main thread to take notice; then it is stuck in C code
_END_SECONDS = 120.0  # for the main thread to handle what was raised in it
_ALONE = (Activity.GENERATING, Activity.SCORING)  # in these no rank waits for another
_OF_A_COLLECTIVE = re.compile("gloo|nccl|connection|peer|store", re.IGNORECASE)

_uses = itertools.count(1)


class RunEnded(RuntimeError):
    """The run cannot go on: an activity hangs, or another rank has failed."""

    exit_code = EXIT_CODE


class Deadlines(Callback):
    """Limits how long each activity of a run may go without progress, in seconds; null = no limit.

    What is over its limit, and a rank that died, failed or is silent, end the run on all ranks within a minute: with a
    message that names rank and activity, the stacks of all threads on stderr, a checkpoint where the trainer still
    lives, and exit code 75. A rank that waits for others is not late while one of them works within its own limits.

    Args:
        load_seconds: Loading models and data before the run (it may download them).
        start_seconds: Starting the engine.
        sync_seconds: One sync of the weights.
        generate_seconds: Generating for one batch; from a server, until the next prompt is finished.
        score_seconds: Scoring one batch.
        train_seconds: Forward and backward of one micro-batch, with the exchange of gradients between ranks.
        save_seconds: Saving a checkpoint.
        other_seconds: Everything between steps: data, logging, metrics, callbacks.
        silent_seconds: No sign of life from another rank, although nothing says that it died.
        exit_seconds: Closing engine, reward and loggers after an error; then the process is ended.
    """

    def __init__(
        self,
        *,
        load_seconds: float | None = None,
        start_seconds: float | None = 1800.0,
        sync_seconds: float | None = 900.0,
        generate_seconds: float | None = 3600.0,
        score_seconds: float | None = 3600.0,
        train_seconds: float | None = 900.0,
        save_seconds: float | None = 1800.0,
        other_seconds: float | None = 1800.0,
        silent_seconds: float | None = 300.0,
        exit_seconds: float = 30.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name.endswith("_seconds")}
        seconds = {name: NO_LIMIT if value is None else min(value, NO_LIMIT) for name, value in arguments.items()}
        for name, value in seconds.items():
            if not value > 0:
                raise UserError(f"deadlines.{name} must be above 0, or null for no limit, got {value}.")
        self.limits = {activity: seconds[activity.setting] for activity in Activity}
        self.silent_seconds = seconds["silent_seconds"]
        self._watchdog: Watchdog | None = None
        self._children: list[subprocess.Popen[Any]] = []  # ranks that this process has started

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for thread in threading.enumerate():
            if isinstance(thread, Watchdog):  # a run in this process failed, and it went on
                thread.stop()
        set_default(Activity.LOADING)
        self._watchdog = Watchdog(trainer, self.limits, self._heartbeat(trainer))
        self._watchdog.start()

    def _heartbeat(self, trainer: pl.Trainer) -> RankHeartbeat:
        """Of several ranks, if they met in a store that it can find."""
        has_store = {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
        if not has_store or not dist.is_initialized() or trainer.world_size == 1:
            return RankHeartbeat()
        started = getattr(trainer.strategy.launcher, "procs", [])
        self._children += started
        # Lightning's observer kills this process (SIGKILL) once a rank of its list has failed: nothing is saved, and
        # what it started is left. The watchdog does its work, in good order.
        started.clear()
        prefix, silent = f"deadlines-{next(_uses)}", self.silent_seconds
        ranks = RankHeartbeat(trainer.global_rank, trainer.world_size, prefix, silent, self._children)
        ranks.start()
        atexit.register(ranks.stop)  # a thread that is in torch's code while the interpreter ends would abort
        atexit.register(ranks.end_children)
        return ranks

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert self._watchdog is not None
        self._watchdog.ranks.is_leaving = True
        trainer.strategy.barrier("tealightning deadlines")  # nobody leaves before all know that it is no fault
        atexit.unregister(self._watchdog.ranks.stop)
        atexit.unregister(self._watchdog.ranks.end_children)
        self._watchdog.stop()
        self._watchdog = None
        set_default(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        watchdog = self._watchdog
        if watchdog is None:
            return
        if watchdog.is_exiting:  # this thread reacts too late, while the other one saves
            watchdog.join(self.limits[Activity.SAVING])
        if not isinstance(exception, Exception):  # an interrupt: no fault
            set_default(None)
            watchdog.handled()
            return
        raised_in = watchdog.closing(activity_of(exception))
        if not isinstance(exception, UserError) and activity_of(exception) is None:
            exception.add_note(progress.note_of(raised_in))
        if isinstance(exception, RunEnded):
            return
        is_of_others = isinstance(exception, dist.DistError) or _OF_A_COLLECTIVE.search(str(exception))
        cause = watchdog.cause() if is_of_others else None
        if cause is not None:
            exception.add_note(cause)
            say(cause)
        words = " ".join([f"{type(exception).__name__}: {exception}", *getattr(exception, "__notes__", ())])
        watchdog.ranks.report(cause or f"Rank {trainer.global_rank} failed: {words}")

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        set_default(Activity.TRAINING)

    def on_after_backward(self, *args: Any, **kwargs: Any) -> None:
        progress.beat()  # of a micro-batch

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        set_default(Activity.OTHER)

    on_fit_start = on_validation_start = on_validation_batch_end = on_train_batch_end
    on_test_start = on_test_batch_end = on_train_batch_end


class Watchdog(threading.Thread):
    """Watches the run from `start` to `stop`. A fault is first raised in the main thread, so that the run ends in good
    order; a main thread that does not take notice, or does not get to an end, is ended with the whole process.

    Made in another thread than the main one it can raise nothing, and ends the process at once.
    """

    def __init__(self, trainer: pl.Trainer, limits: Mapping[Activity, float], ranks: RankHeartbeat) -> None:
        super().__init__(name="tealightning watchdog", daemon=True)
        self.trainer, self.limits, self.ranks = trainer, limits, ranks
        self.fault: str | None = None
        self._who = f"Rank {trainer.global_rank}" if ranks.others else "The run"
        self._failed_in: Activity | None = None  # what the main thread did when it came to an end
        self._is_closing = self._is_handled = False  # an exception is being handled, or has been
        self.is_exiting = False  # without the main thread's consent
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._handler: Any = None
        if threading.get_ident() == self._main:
            self._handler = signal.signal(signal.SIGUSR2, self._on_signal)
        progress.on_change = self._on_change
        if not faulthandler.is_enabled():  # a crash in C code says where Python stood
            faulthandler.enable(file=2)  # by number: what replaced `sys.stderr` may have none

    def closing(self, raised_in: Activity | None = None) -> Activity:
        """Expect an exception to be handled within `limits[CLOSING]`; the activity that it was raised in."""
        self._failed_in = raised_in or self._failed_in or self._progress()[0]
        if not self._is_closing:
            self._is_closing = True
            set_default(Activity.CLOSING, self._main)
        return self._failed_in

    def handled(self) -> None:
        """Expect the process to be left, if its entry point has returned."""
        self._is_closing = self._is_handled = True
        faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        """End the watch: all went well."""
        progress.on_change = None
        self._stopped.set()
        if self.is_alive():
            self.join(10)
        if self._handler is not None:  # now that no signal will come
            signal.signal(signal.SIGUSR2, self._handler)
        self.ranks.stop()
        faulthandler.cancel_dump_traceback_later()

    def cause(self) -> str | None:
        """What another rank did, if one has failed; waits for the news."""
        deadline = time.monotonic() + _NEWS_SECONDS
        while (fault := self._fault_of_others()) is None and self.ranks.others and time.monotonic() < deadline:
            time.sleep(0.1)
        return fault or self._fault_of_others(silent_seconds=4 * self.ranks.interval)

    def _on_change(self) -> None:
        """Set the timer before the main thread can get stuck, with Python's lock, in what it begins."""
        if threading.get_ident() == self._main and self.fault is None and not self._is_closing:
            self._set_timer()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.fault is not None and not self._is_closing:
            raise RunEnded(self.fault)

    def run(self) -> None:
        """Watch for a fault, then that an exception is handled, then that the process ends."""
        while not self._is_failing():
            if (fault := self._find_fault()) is not None:
                self._raise(fault)
            if self._stopped.wait(_TICK_SECONDS):
                return
        if not self._is_handled:
            self.closing()
        while not self._is_handled and self.trainer.state.stage is not None:  # None: the trainer is done with it
            activity, seconds = self._progress()
            self._set_timer()
            if seconds > self.limits[activity]:
                self._exit_now(f"{self._who} was {activity} for {seconds:.0f} s")
            if self._stopped.wait(_TICK_SECONDS):
                return
        self.handled()
        while not progress.is_process_ending.is_set():
            if self._stopped.wait(_TICK_SECONDS):
                return
        if not self._stopped.wait(self.limits[Activity.CLOSING]):
            self._exit_now("Its threads do not end")

    def _find_fault(self) -> str | None:
        mine, mine_seconds = self._progress()
        self._set_timer()
        doing = progress.current().values()
        over = {activity: seconds for activity, seconds in doing if seconds > self.limits[activity]}
        late = max(over, key=lambda activity: over[activity] - self.limits[activity], default=None)
        self.ranks.message = {"text": f"{mine} for {mine_seconds:.0f} s", "is_late": late is not None}
        if (fault := self._fault_of_others()) is not None:
            return fault
        # A rank that waits for others is not stuck while one of them works within its own limits.
        if late is None or (late not in _ALONE and not self.ranks.are_late()):
            return None
        faulthandler.dump_traceback(file=2)
        limit = f"deadlines.{late.setting}={self.limits[late]:g}"
        return (
            f"{self._who} made no progress for {over[late]:.0f} s while {late} ({limit}; optimizer step "
            f"{self.trainer.global_step}).{self.ranks.last_words()}"
        )

    def _raise(self, fault: str) -> None:
        """Raise a fault in the main thread, and end the process if that takes no notice."""
        self.fault, self._failed_in = fault, self._progress()[0]
        say(fault)
        self.ranks.report(fault)
        _end_unless_called_again(_END_SECONDS)
        if self._handler is not None and not self._is_failing():  # else it comes to an end by itself
            signal.pthread_kill(self._main, signal.SIGUSR2)
        deadline = time.monotonic() + (_RAISE_SECONDS if self._handler is not None else 0.0)
        while not self._is_failing() and not self._stopped.wait(_TICK_SECONDS):
            if time.monotonic() > deadline:
                self._exit_now("The main thread does not react")

    def _exit_now(self, why: str) -> None:
        """End the process without its consent, after saving what the main thread cannot save any more."""
        self.is_exiting = True
        faulthandler.dump_traceback(file=2)
        say(f"{why}: it is ended now.")
        _end_unless_called_again(self.limits[Activity.SAVING])
        try:
            if not self._is_handled and self._failed_in != Activity.SAVING:  # else it is saved, or stuck in that
                for callback in self.trainer.checkpoint_callbacks:
                    callback.on_exception(self.trainer, self.trainer.lightning_module, RunEnded(self.fault or why))
        except Exception as error:  # whatever it is: the process has to end
            say(f"Nothing could be saved: {type(error).__name__}: {error}")
        self.ranks.end_children()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _is_failing(self) -> bool:
        return self._is_closing or self.trainer.state.status == TrainerStatus.INTERRUPTED

    def _fault_of_others(self, silent_seconds: float | None = None) -> str | None:
        """A fault of another rank, and what this one was doing."""
        fault, mine = self.ranks.fault(silent_seconds), self._failed_in or self._progress()[0]
        return None if fault is None else f"{fault} {self._who} was {mine} (optimizer step {self.trainer.global_step})."

    def _progress(self) -> tuple[Activity, float]:
        """What the main thread does, and for how many seconds without progress."""
        return progress.current().get(self._main, (Activity.OTHER, 0.0))

    def _set_timer(self) -> None:
        """Have the process end if this thread does not run again in time, because C code holds Python's lock."""
        activity, seconds = self._progress()
        _end_unless_called_again(max(0.0, self.limits[activity] - seconds) + _RAISE_SECONDS)


def say(text: str) -> None:
    print(f"tealightning: {text}", file=sys.stderr, flush=True)


def _end_unless_called_again(seconds: float) -> None:
    """Set `faulthandler`'s timer, of which a process has one: it works while C code holds Python's lock."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
