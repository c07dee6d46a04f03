"""Translate an engine's errors: in which phase they came, and what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "memoryerror")


class EngineError(RuntimeError):
    """An engine broke down; the message says in which phase."""


@contextmanager
def broken_down(name: str, phase: str, memory_hint: str, on_break: Callable[[], None]) -> Iterator[None]:
    """Whatever is raised inside, except for a ValueError, which is about what it was asked for, means that the engine
    cannot be used any more.

    Args:
        name: Of the engine, for the message.
        phase: What it is doing.
        memory_hint: What to change if it was out of memory.
        on_break: Called before the error is raised.

    Raises:
        EngineError: with the phase.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a library's own: an assertion, a CUDA error, a queue that is empty ...
        on_break()
        words = f"{type(error).__name__}: {error}"
        hint = f" {memory_hint}" if any(sign in words.lower() for sign in _MEMORY) else ""
        raise EngineError(f"{name} broke down while {phase}: {words}.{hint}") from error
