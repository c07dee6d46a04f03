"""Folders that one process has for itself."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path, message: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder, made if it is missing, alone while the context lasts and this process lives.

    Args:
        folder: The folder; the lock is its file `.lock`.
        message: Of the error.
        wait_seconds: How long another process is waited for, one that is just ending for instance.

    Raises:
        ValueError: with `message` if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ValueError(message) from None
                time.sleep(0.2)
        yield
