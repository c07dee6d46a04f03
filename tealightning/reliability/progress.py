"""Per-thread activity, used to detect hangs and to label errors.

Whoever does something that may take long says so, `with during(RunPhase.SYNCING): ...`; whoever watches reads
`current()`. The clock of a phase is the time without progress: it starts anew with `beat()` and whenever a phase inside
it begins or ends.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class RunPhase(StrEnum):
    """The phases of a run, in words."""

    LOADING = "loading the models and the data"
    STARTING = "starting the engine"
    SYNCING = "syncing weights"
    GENERATING = "generating"
    SCORING = "scoring"
    TRAINING = "training (forward, backward, optimizer step)"
    SAVING = "saving a checkpoint"
    OTHER = "working between steps (data, logging, metrics, callbacks)"
    CLOSING = "ending after an error"


_NOTE = "It happened while"


SETTINGS = {
    RunPhase.LOADING: "load_seconds",
    RunPhase.STARTING: "start_seconds",
    RunPhase.SYNCING: "sync_seconds",
    RunPhase.GENERATING: "generate_seconds",
    RunPhase.SCORING: "score_seconds",
    RunPhase.TRAINING: "train_seconds",
    RunPhase.SAVING: "save_seconds",
    RunPhase.OTHER: "other_seconds",
    RunPhase.CLOSING: "exit_seconds",
}
"""Of each phase, the setting of `deadlines` that limits it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Doing:
    """What one thread does."""

    phase: RunPhase
    seconds: float  # without progress


_LOCK = threading.Lock()
_STACKS: dict[int, list[RunPhase]] = {}  # by thread, the innermost phase last
_GROUND: dict[int, RunPhase] = {}  # by thread, what it does when its stack is empty
_BEATS: dict[int, float] = {}  # by thread, time of the last progress
_LISTENERS: list[Callable[[], None]] = []


@contextmanager
def during(phase: RunPhase) -> Iterator[None]:
    """This thread is in `phase` inside. What is raised inside gets a note that says so."""
    me = threading.get_ident()
    with _LOCK:
        _STACKS.setdefault(me, []).append(phase)
        _BEATS[me] = time.monotonic()
    try:
        _tell_listeners()
        yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(in_phase(phase))
        raise
    finally:
        with _LOCK:
            _STACKS[me].pop()
            _BEATS[me] = time.monotonic()
            _forget_if_idle(me)
        _tell_listeners()


def in_phase(phase: RunPhase) -> str:
    """The note on an error that was raised in `phase`."""
    return f"{_NOTE} {phase}."


def phase_of(error: BaseException) -> RunPhase | None:
    """The phase that the notes on an error tell."""
    told = {in_phase(phase): phase for phase in RunPhase}
    return next((told[note] for note in getattr(error, "__notes__", ()) if note in told), None)


def beat() -> None:
    """This thread gets on."""
    me = threading.get_ident()
    with _LOCK:
        if me in _BEATS:
            _BEATS[me] = time.monotonic()


def set_ground(phase: RunPhase | None, thread: int | None = None) -> None:
    """What a thread, by default this one, does from here on when it is in no other phase: set step by step, where there
    is no block to be in. This is progress. None = nothing in particular."""
    thread = threading.get_ident() if thread is None else thread
    with _LOCK:
        _BEATS[thread] = time.monotonic()
        if phase is not None:
            _GROUND[thread] = phase
        else:
            _GROUND.pop(thread, None)
            _forget_if_idle(thread)
    _tell_listeners()


def listen(listener: Callable[[], None]) -> Callable[[], None]:
    """Have `listener` called by every thread that changes its phase; what is returned ends that."""
    _LISTENERS.append(listener)
    return lambda: _LISTENERS.remove(listener)


def _tell_listeners() -> None:
    for listener in tuple(_LISTENERS):
        listener()


def current() -> dict[int, Doing]:
    """What the threads that are in a phase do, by their identifier."""
    now = time.monotonic()
    with _LOCK:
        return {
            thread: Doing(phase=_STACKS[thread][-1] if thread in _STACKS else _GROUND[thread], seconds=now - at)
            for thread, at in _BEATS.items()
        }


def _forget_if_idle(thread: int) -> None:
    if not _STACKS.get(thread, True):
        del _STACKS[thread]
    if thread not in _STACKS and thread not in _GROUND:
        del _BEATS[thread]


_owns_process = False


def own_process() -> None:
    """This process is a run of the command: it may be ended when its exit takes too long. A program that calls this
    package is its own master."""
    global _owns_process
    _owns_process = True


def owns_process() -> bool:
    """Whether `own_process` was called."""
    return _owns_process
