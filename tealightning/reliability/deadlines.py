"""Deadlines: end a run that hangs or has lost a rank, instead of letting it wait for ever."""

import atexit
import re
import subprocess
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from tealightning.errors import UserError
from tealightning.reliability.progress import Activity, activity_of, beat, note_of, set_default
from tealightning.reliability.rank_heartbeat import RankHeartbeat
from tealightning.reliability.watchdog import SETTINGS, RunEnded, Watchdog

_NEWS_SECONDS = 3.0  # for the news of which rank failed first
_OF_A_COLLECTIVE = re.compile("gloo|nccl|connection|peer|store", re.IGNORECASE)

_uses = 0
_latest: Watchdog | None = None  # the process's own: of a stage that ended by an exception, it looks after the exit


class Deadlines(Callback):
    """Limits how long each activity of a run may go without progress, in seconds; null = no limit.

    An activity that is over its limit, a rank that has died or is silent, and a rank that failed end the run on all
    ranks within a minute: with a message that names rank and activity, the stacks of all threads on stderr, a
    checkpoint where the trainer still lives, and exit code 75. A rank that waits for others is not late while one of
    them works within its own limits.

    Args:
        load_seconds: Loading models and data before the run (it may download them).
        start_seconds: Starting the engine.
        sync_seconds: One sync of the weights.
        generate_seconds: Generating for one batch; from a server, until the next prompt is finished.
        score_seconds: Scoring one batch.
        train_seconds: Forward and backward of one micro-batch, with the exchange of gradients between ranks.
        save_seconds: Saving a checkpoint.
        other_seconds: Everything between steps: data, logging, metrics, callbacks.
        silent_seconds: No sign of life from another rank, although nothing says that it died: a machine that is
            gone, a process that was stopped.
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
        seconds = {name: value for name, value in locals().items() if name.endswith("_seconds")}
        for name, value in seconds.items():
            if value is not None and not value > 0:
                raise UserError(f"deadlines.{name} must be above 0, or null for no limit, got {value}.")
        self.limits: dict[Activity, float | None] = {activity: seconds[SETTINGS[activity]] for activity in Activity}
        self.silent_seconds = silent_seconds
        self._watchdog: Watchdog | None = None
        self._children: list[subprocess.Popen[Any]] = []  # ranks that this process has started

    # ---------------------------------------------------------------- life cycle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        global _latest, _uses
        if _latest is not None:  # a run in this process failed, and it went on
            _latest.stop()
        _uses += 1
        set_default(Activity.LOADING)
        self._watchdog = _latest = Watchdog(trainer, self.limits, self._heartbeat(trainer))
        self._watchdog.start()

    def _heartbeat(self, trainer: pl.Trainer) -> RankHeartbeat | None:
        if not RankHeartbeat.is_possible():
            return None
        started = getattr(trainer.strategy.launcher, "procs", [])
        self._children += started
        # Lightning's observer kills this process (SIGKILL) once a rank of its list has failed: nothing is saved, and
        # what it started is left. The watchdog does its work, in good order.
        started.clear()
        ranks = RankHeartbeat(
            trainer.global_rank,
            trainer.world_size,
            f"deadlines-{_uses}",
            silent_seconds=self.silent_seconds,
            children=self._children,
        )
        if self._children:
            atexit.register(ranks.end_children)
        ranks.start()
        return ranks

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        global _latest
        if self._watchdog is None:
            return
        if (ranks := self._watchdog.ranks) is not None:
            ranks.is_leaving = True
            trainer.strategy.barrier("tealightning deadlines")  # nobody leaves before all know that it is no fault
            atexit.unregister(ranks.end_children)
        self._watchdog.stop()
        set_default(None)
        self._watchdog = _latest = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        watchdog = self._watchdog
        if watchdog is None:
            return
        if not isinstance(exception, Exception):  # an interrupt: no fault
            set_default(None)
            watchdog.handled()
            return
        raised_in = watchdog.closing(activity_of(exception))
        if not isinstance(exception, UserError) and activity_of(exception) is None:
            exception.add_note(note_of(raised_in))
        if watchdog.ranks is None or isinstance(exception, RunEnded):
            return
        is_of_others = isinstance(exception, dist.DistError) or _OF_A_COLLECTIVE.search(str(exception))
        cause = watchdog.cause(_NEWS_SECONDS) if is_of_others else None
        if cause is not None:
            exception.add_note(cause)
            watchdog.say(cause)
        words = " ".join([f"{type(exception).__name__}: {exception}", *getattr(exception, "__notes__", ())])
        watchdog.ranks.report(cause or f"Rank {trainer.global_rank} failed: {words}")

    # ---------------------------------------------------------------- activities

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._watchdog is not None:
            set_default(Activity.TRAINING)

    def on_after_backward(self, *args: Any, **kwargs: Any) -> None:
        beat()  # of a micro-batch

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._watchdog is not None:
            set_default(Activity.OTHER)

    on_fit_start = on_validation_start = on_validation_batch_end = on_train_batch_end
    on_test_start = on_test_batch_end = on_train_batch_end
