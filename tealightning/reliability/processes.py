"""Child processes that end with their parent, however it ends: killed, crashed or interrupted.

Also the script of the supervisor between the two, which is why this file uses the standard library alone. It starts the
command in a process group of its own, and ends that group on SIGTERM or once its stdin closes: the parent is gone.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_END_SECONDS = 30.0  # for the supervisor to end its command
_POLL_SECONDS = 0.05
_TAIL_LINES = 25


class ChildProcess:
    """Runs a command that ends, with all that it started, on `close` and when this process ends, even by SIGKILL.

    Between SIGTERM and SIGKILL it has `grace_seconds`; 0 = SIGKILL at once. File descriptors of `pass_fds` reach it.
    """

    def __init__(self, command: Sequence[str], *, grace_seconds: float, **popen_args: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(grace_seconds), *command],
            stdin=subprocess.PIPE,  # closed by the kernel when this process ends
            start_new_session=True,  # an interrupt from the keyboard is for the trainer, which then closes this
            **popen_args,
        )

    def exit_code(self, *, wait_seconds: float = 0.0) -> int | None:
        """Exit code, or 128 + the number of the signal that ended it; None if it still runs after `wait_seconds`."""
        try:
            return self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End it and wait until it has ended; safe to call twice, from any thread."""
        assert self._process.stdin is not None
        self._process.terminate()  # a forked child of this process may hold the pipe open
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


class LocalServer(ChildProcess):
    """A server process whose output goes to a log file, by default a temporary one that `close` removes."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log_file: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="tealightning-server-")
        self.log_file = log_file or Path(self._temporary.name) / "server.log"
        with self.log_file.open("wb") as output:
            super().__init__(command, grace_seconds=10.0, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def log_tail(self) -> str:
        """The last lines of its output."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def close(self) -> None:
        super().close()
        self._temporary.cleanup()


def supervise(grace_seconds: float, command: Sequence[str]) -> int:
    """Run `command` until it ends or has to; its exit code, or 128 + the number of the signal that ended it."""
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=False)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent is to notice when the command closes the other end
    while child.poll() is None and not signals:
        stdin_is_ready, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if stdin_is_ready and not os.read(0, 4096):
            break
    # Also what a command that was killed has left behind: Python's resource tracker needs a moment, in which it removes
    # their shared memory.
    deadline = time.monotonic() + grace_seconds
    if grace_seconds > 0:
        _signal_group(child.pid, signal.SIGTERM)
    while time.monotonic() < deadline and _signal_group(child.pid, 0):
        time.sleep(_POLL_SECONDS)
        child.poll()  # a process that has ended belongs to its group until it is waited for
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Whether there is a process in the group; signal 0 only asks."""
    try:
        os.killpg(group, number)
        return True
    except ProcessLookupError:
        return False


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
