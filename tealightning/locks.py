"""Lock a folder for one process."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path, message: str, *, wait_seconds: float = 0.0, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold a folder, made if it is missing, alone while the context lasts and this process lives.

    The kernel gives the lock back when the process ends, however it ends, so a lock is never left over; the file stays.
    On a file system without locks (some network mounts) there is a warning instead.

    Args:
        folder: The folder; the lock is a file in it, which says who holds it.
        message: Of the error.
        wait_seconds: How long another process is waited for, one that is just ending for instance.
        name: Of the file.

    Raises:
        ValueError: with `message` and who it is, if another process holds it.
        OSError: if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    # Not truncated: it is the other one's until the lock is this process's.
    with open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        while not _try(file, folder):
            if time.monotonic() >= deadline:
                raise ValueError(f"{message}{_holder(file)}") from None
            time.sleep(0.2)
        _sign(file)
        yield


def _try(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {folder} has no locks ({error.strerror}): see to it yourself that no two runs write "
            "into this folder.",
            stacklevel=2,
        )
    return True


def _sign(file: IO[str]) -> None:
    """Say who holds the lock; the first write to the folder, so that a full disk is noticed here."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    file.seek(0)
    file.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, file)
    file.flush()
    os.fsync(file.fileno())


def _holder(file: IO[str]) -> str:
    """` It is process 123 on host, since ...`; empty where the file does not say."""
    try:
        holder: Any = json.loads(file.read())
        pid, host, started = holder["pid"], holder["host"], holder["started"]
    except (ValueError, KeyError, TypeError):
        return ""
    told = f" It is process {pid} on {host}, since {started}."
    if host == socket.gethostname() and not Path("/proc", str(pid)).exists() and Path("/proc/self").exists():
        told += " That process has ended, and one that it started still holds the folder."
    return told
