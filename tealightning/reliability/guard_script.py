"""Script of the guard process: watches one process from outside, kills it when stuck, removes what it left.

A script of the standard library alone, started by `Guard`. It reads one JSON object a line from stdin: `seconds`, how
long until the next line at most (null = as long as it likes), `text`, what to say if none comes, and `remove`, folders
that are to go when the process has ended. A process whose main thread is stuck in C code that holds the interpreter's
lock cannot end itself: none of its threads runs any more.
"""

import json
import os
import select
import shutil
import signal
import sys
import time
from typing import Any

STACKS_SECONDS = 5.0  # for the stacks of a process that has faulthandler enabled
POLL_SECONDS = 0.5


def main(process: int) -> None:
    """Watch `process`, our parent, until it has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the parent
        signal.signal(number, signal.SIG_IGN)
    order: dict[str, Any] = {"seconds": None, "text": "", "remove": []}
    heard, pending = time.monotonic(), b""
    while os.getppid() == process:  # a forked child of the parent may hold the pipe open
        if select.select([0], [], [], POLL_SECONDS)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            if lines:
                order, heard = json.loads(lines[-1]), time.monotonic()
        elif order["seconds"] is not None and time.monotonic() - heard > order["seconds"]:
            end(process, order["text"])
            break
    while os.getppid() == process and order["seconds"] is not None:  # the pipe was closed, and it still ends
        time.sleep(POLL_SECONDS)
    for folder in order["remove"]:
        shutil.rmtree(folder, ignore_errors=True)


def end(process: int, text: str) -> None:
    """Have `process` write its stacks, and kill it."""
    print(text, file=sys.stderr, flush=True)
    os.kill(process, signal.SIGABRT)
    deadline = time.monotonic() + STACKS_SECONDS
    while os.getppid() == process and time.monotonic() < deadline:
        time.sleep(0.1)
    if os.getppid() == process:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
