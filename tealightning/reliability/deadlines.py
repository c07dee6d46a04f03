"""Deadlines: end a run that hangs or has lost a rank, instead of letting it wait for ever."""

import atexit
import re
import threading
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus

from tealightning.errors import UserError
from tealightning.reliability.progress import SETTINGS, RunPhase, in_phase, phase_of, set_ground
from tealightning.reliability.rank_failures import OtherRanks
from tealightning.reliability.rank_heartbeat import Peers
from tealightning.reliability.watchdog import RunEnded, Surroundings, Watch

_NEWS_SECONDS = 3.0  # for the news of which rank failed first
_OF_A_COLLECTIVE = re.compile("gloo|nccl|connection|peer|store", re.IGNORECASE)

_uses = 0
_latest: Watch | None = None  # the process's own: of a stage that ended by an exception, it looks after the exit


class Deadlines(Callback):
    """Limits how long each phase of a run may go without progress, in seconds; null = no limit.

    A phase that is over its limit, a rank that has died or is silent, and a rank that failed end the run on all ranks
    within a minute: with a message that names rank and phase, the stacks of all threads on stderr, a checkpoint where
    the trainer still lives, and exit code 75. A rank that waits for others is not late while one of them works within
    its own limits.

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
        given = {name: value for name, value in locals().items() if name.endswith("_seconds")}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise UserError(f"deadlines.{name} must be above 0, or null for no limit, got {value}.")
        self.limits: dict[RunPhase, float | None] = {phase: given[SETTINGS[phase]] for phase in RunPhase}
        self.silent_seconds = silent_seconds
        self._watch: Watch | None = None

    # ---------------------------------------------------------------- life cycle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        global _latest, _uses
        if _latest is not None:  # a run in this process failed, and it went on
            _latest.stop()
        _uses += 1
        set_ground(RunPhase.LOADING)
        others = self._others(trainer)
        self._watch = _latest = Watch(
            Surroundings(
                who="The run" if others is None else f"Rank {trainer.global_rank}",
                limits=self.limits,
                step=lambda: f"optimizer step {trainer.global_step}",
                rescue=lambda fault: self._rescue(trainer, fault),
                is_failing=lambda: trainer.state.status == TrainerStatus.INTERRUPTED,
                is_handled=lambda: trainer.state.stage is None,
            ),
            others,
        )
        self._watch.start()

    def _others(self, trainer: pl.Trainer) -> OtherRanks | None:
        if not Peers.can_meet():
            return None
        peers = Peers(trainer.global_rank, trainer.world_size, f"deadlines-{_uses}")
        started = list(getattr(trainer.strategy.launcher, "procs", ()))
        others = OtherRanks(peers, silent_seconds=self.silent_seconds, started=started)
        if started:
            _retire_lightnings_observer()
            atexit.register(others.end)
        return others

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        global _latest
        watch = self._watch
        if watch is None:
            return
        if watch.ranks is not None:
            watch.ranks.leave()
            trainer.strategy.barrier("tealightning deadlines")  # nobody leaves before all know that it is no fault
            atexit.unregister(watch.ranks.end)
        watch.stop()
        set_ground(None)
        self._watch = _latest = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        watch = self._watch
        if watch is None:
            return
        if not isinstance(exception, Exception):  # an interrupt: no fault
            set_ground(None)
            watch.handled()
            return
        phase = watch.closing(phase_of(exception))
        if not isinstance(exception, ValueError) and phase_of(exception) is None:
            exception.add_note(in_phase(phase))
        if watch.ranks is None or isinstance(exception, RunEnded):
            return
        is_of_others = isinstance(exception, dist.DistError) or _OF_A_COLLECTIVE.search(str(exception))
        cause = watch.cause(_NEWS_SECONDS) if is_of_others else None
        if cause is not None:
            exception.add_note(cause)
            watch.say(cause)
        words = " ".join([f"{type(exception).__name__}: {exception}", *getattr(exception, "__notes__", ())])
        watch.ranks.report(cause or f"Rank {trainer.global_rank} failed: {words}")

    def _rescue(self, trainer: pl.Trainer, fault: str) -> None:
        """Save what the main thread cannot save any more, and does not change any more."""
        for callback in trainer.checkpoint_callbacks:
            callback.on_exception(trainer, trainer.lightning_module, RunEnded(fault))

    # ---------------------------------------------------------------- phases

    def _begin(self, phase: RunPhase) -> None:
        if self._watch is not None:
            set_ground(phase)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(RunPhase.OTHER)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin(RunPhase.TRAINING)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._begin(RunPhase.OTHER)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(RunPhase.OTHER)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._begin(RunPhase.OTHER)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(RunPhase.OTHER)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._begin(RunPhase.OTHER)


def _retire_lightnings_observer() -> None:
    """Lightning kills the process that started the ranks (SIGKILL) once one of them has failed: nothing is saved, and
    what it started is left. The watch does its work, in good order."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True  # type: ignore[attr-defined] # "all have ended": it stops looking
