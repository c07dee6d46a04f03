"""Supervise a command: end it and all of its processes once stdin closes, however its parent ends.

A script of the standard library alone, started by `LocalServer`: it has to outlive a parent that is killed.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 10.0  # between asking a server to end and killing it


def main(command: list[str]) -> int:
    """Run `command` in a process group of its own; its exit code, or 128 + the signal that ended it."""
    reasons_to_end: list[str] = []  # not an Event: a signal handler that sets one can wait for its own thread for ever
    signal.signal(signal.SIGTERM, lambda *_: reasons_to_end.append("SIGTERM"))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_wait_for_stdin, args=(reasons_to_end,), daemon=True).start()
    while child.poll() is None and not reasons_to_end:
        time.sleep(0.1)
    # Also what a command that was killed has left behind: Python's resource tracker needs a moment, in which it removes
    # their shared memory.
    deadline = time.monotonic() + GRACE_SECONDS
    is_left = _signal_group(child.pid, signal.SIGTERM)
    while is_left and time.monotonic() < deadline:
        time.sleep(0.1)
        child.poll()  # a process that has ended belongs to its group until it is waited for
        is_left = _signal_group(child.pid, 0)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _wait_for_stdin(reasons_to_end: list[str]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    reasons_to_end.append("stdin closed")


def _signal_group(group: int, number: int) -> bool:
    """Whether there is a process in the group; signal 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
