"""Per-thread activity, used to detect hangs and to label errors.

Code that may take long says so, `with during(Activity.SYNCING): ...`. The watchdog limits the time without progress: it
starts anew with `beat()` and whenever an activity, also one inside another, begins or ends.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps


class Activity(StrEnum):
    """What a run does, in words, and the setting of `deadlines` that limits it."""

    LOADING = "loading the models and the data", "load_seconds"
    STARTING = "starting the engine", "start_seconds"
    SYNCING = "syncing weights", "sync_seconds"
    GENERATING = "generating", "generate_seconds"
    SCORING = "scoring", "score_seconds"
    TRAINING = "training (forward, backward, optimizer step)", "train_seconds"
    SAVING = "saving a checkpoint", "save_seconds"
    OTHER = "working between steps (data, logging, metrics, callbacks)", "other_seconds"
    CLOSING = "ending after an error", "exit_seconds"

    setting: str

    def __new__(cls, words: str, setting: str) -> "Activity":
        activity = str.__new__(cls, words)
        activity._value_, activity.setting = words, setting
        return activity


_Stack = list[Activity | None]  # what a thread does outside of `during`, then the nested activities
_LOCK = threading.Lock()
_STACKS: dict[int, _Stack] = {}  # by thread
_BEATS: dict[int, float] = {}  # by thread, time of the last progress
on_change: Callable[[], None] | None = None  # called by every thread that changes its activity


@contextmanager
def during(activity: Activity) -> Iterator[None]:
    """Mark the time inside as spent on an activity, by this thread. What is raised inside gets a note that says so."""
    me = threading.get_ident()
    _change(me, lambda stack: [*stack, activity])
    try:
        yield
    except Exception as error:
        if activity_of(error) is None:
            error.add_note(note_of(activity))
        raise
    finally:
        _change(me, lambda stack: stack[:-1])


def note_of(activity: Activity) -> str:
    """The note on an error that was raised during an activity."""
    return f"It happened while {activity}."


def activity_of(error: BaseException) -> Activity | None:
    """The activity in the notes on an error."""
    notes = getattr(error, "__notes__", ())
    return next((activity for activity in Activity if note_of(activity) in notes), None)


def beat() -> None:
    """Record progress of this thread, if it is at an activity."""
    me = threading.get_ident()
    with _LOCK:
        if me in _BEATS:
            _BEATS[me] = time.monotonic()


def set_default(activity: Activity | None, thread: int | None = None) -> None:
    """Set what a thread, by default this one, does from here on outside of `during`; None = nothing."""
    _change(threading.get_ident() if thread is None else thread, lambda stack: [activity, *stack[1:]])


def current() -> dict[int, tuple[Activity, float]]:
    """What the threads that are at an activity do, and for how many seconds without progress, by their identifier."""
    now = time.monotonic()
    with _LOCK:
        return {thread: (stack[-1] or Activity.OTHER, now - _BEATS[thread]) for thread, stack in _STACKS.items()}


def _change(thread: int, change: Callable[[_Stack], _Stack]) -> None:
    with _LOCK:
        _STACKS[thread], _BEATS[thread] = change(_STACKS.get(thread, [None])), time.monotonic()
        if _STACKS[thread] == [None]:
            del _STACKS[thread], _BEATS[thread]
    if (listener := on_change) is not None:  # read once: another thread may reset it
        listener()


is_process_ending = threading.Event()  # an entry point that owns the process has returned or raised


def owns_process(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command's entry point: called without arguments it is the process's own, which then ends with it
    and may be killed if it does not."""

    @wraps(main)
    def entry_point(*args: object) -> None:
        is_process_ending.clear()
        try:
            main(*args)
        finally:
            if not args:
                is_process_ending.set()

    return entry_point
