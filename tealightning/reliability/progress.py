"""Per-thread activity, used to detect hangs and to label errors.

Code that may take long says so, `with during(Activity.SYNCING): ...`; the watchdog reads `current()`. What it watches
is the time without progress: it starts anew with `beat()` and whenever an activity inside another begins or ends.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps


class Activity(StrEnum):
    """What a run does, in words."""

    LOADING = "loading the models and the data"
    STARTING = "starting the engine"
    SYNCING = "syncing weights"
    GENERATING = "generating"
    SCORING = "scoring"
    TRAINING = "training (forward, backward, optimizer step)"
    SAVING = "saving a checkpoint"
    OTHER = "working between steps (data, logging, metrics, callbacks)"
    CLOSING = "ending after an error"


@dataclass(kw_only=True, slots=True, frozen=True)
class ThreadProgress:
    """What one thread does."""

    activity: Activity
    seconds: float  # without progress


_NOTE = "It happened while"
_LOCK = threading.Lock()
_STACKS: dict[int, list[Activity]] = {}  # by thread, the innermost activity last
_DEFAULTS: dict[int, Activity] = {}  # by thread, what it does when its stack is empty
_BEATS: dict[int, float] = {}  # by thread, time of the last progress
_listener: Callable[[], None] | None = None


@contextmanager
def during(activity: Activity) -> Iterator[None]:
    """Mark the time inside as spent on an activity, by this thread. What is raised inside gets a note that says so."""
    me = threading.get_ident()
    with _LOCK:
        _STACKS.setdefault(me, []).append(activity)
        _BEATS[me] = time.monotonic()
    try:
        _call_listener()
        yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(note_of(activity))
        raise
    finally:
        with _LOCK:
            _STACKS[me].pop()
            _BEATS[me] = time.monotonic()
            _forget_if_idle(me)
        _call_listener()


def note_of(activity: Activity) -> str:
    """The note on an error that was raised during an activity."""
    return f"{_NOTE} {activity}."


def activity_of(error: BaseException) -> Activity | None:
    """The activity that the notes on an error tell."""
    activities = {note_of(activity): activity for activity in Activity}
    return next((activities[note] for note in getattr(error, "__notes__", ()) if note in activities), None)


def beat() -> None:
    """Record progress of this thread, if it is at an activity."""
    me = threading.get_ident()
    with _LOCK:
        if me in _BEATS:
            _BEATS[me] = time.monotonic()


def set_default(activity: Activity | None, thread: int | None = None) -> None:
    """Set what a thread, by default this one, does from here on outside of `during`; None = nothing. This is progress.

    For what begins in one function and ends in another.
    """
    thread = threading.get_ident() if thread is None else thread
    with _LOCK:
        _BEATS[thread] = time.monotonic()
        if activity is not None:
            _DEFAULTS[thread] = activity
        else:
            _DEFAULTS.pop(thread, None)
            _forget_if_idle(thread)
    _call_listener()


def current() -> dict[int, ThreadProgress]:
    """What the threads that are at an activity do, by their identifier."""
    now = time.monotonic()
    with _LOCK:
        return {
            thread: ThreadProgress(
                activity=_STACKS[thread][-1] if thread in _STACKS else _DEFAULTS[thread], seconds=now - at
            )
            for thread, at in _BEATS.items()
        }


def set_listener(listener: Callable[[], None] | None) -> None:
    """Have every thread that changes its activity call `listener`, in the place of the one before; None = nobody."""
    global _listener
    _listener = listener


def _call_listener() -> None:
    if (listener := _listener) is not None:
        listener()


def _forget_if_idle(thread: int) -> None:
    if not _STACKS.get(thread, True):
        del _STACKS[thread]
    if thread not in _STACKS and thread not in _DEFAULTS:
        del _BEATS[thread]


_is_process_ending = False


def owns_process(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command's entry point: where it is called without arguments, the process ends with it, and may be
    killed if it does not. A program that calls this package is its own master."""

    @wraps(main)
    def entry_point(*args: object) -> None:
        global _is_process_ending
        try:
            main(*args)
        finally:
            _is_process_ending = not args

    return entry_point


def is_process_ending() -> bool:
    """Whether an entry point that owns the process has returned or raised."""
    return _is_process_ending
