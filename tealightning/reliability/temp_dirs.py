"""Remove temporary folders when this process ends, however it ends."""

import threading
from pathlib import Path

_LOCK = threading.Lock()
_FOLDERS: set[str] = set()


def add(folder: Path) -> None:
    """Whoever watches over this process removes `folder` if it is still known when the process has ended."""
    with _LOCK:
        _FOLDERS.add(str(folder.resolve()))


def discard(folder: Path) -> None:
    """It has been removed."""
    with _LOCK:
        _FOLDERS.discard(str(folder.resolve()))


def folders() -> list[str]:
    """Those that are there now, sorted."""
    with _LOCK:
        return sorted(_FOLDERS)
