"""Child processes that end with their parent, however it ends: killed, crashed or interrupted.

Also the script of the supervisor between the two, which is why this file uses the standard library alone: it starts the
command in a process group of its own, and ends that group once its own stdin closes, as the kernel does to it when the
parent is gone, or on SIGTERM.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_END_SECONDS = 30.0  # for the supervisor to end its command
_POLL_SECONDS = 0.05
_TAIL_LINES = 25


class ChildProcess:
    """Runs a command that ends, with all that it started, on `close` and when this process ends, even by SIGKILL.

    Args:
        command: Program and arguments.
        grace_seconds: Time between SIGTERM and SIGKILL when it is ended; 0 = SIGKILL at once.
        popen_args: Further arguments of `subprocess.Popen`; file descriptors of `pass_fds` reach the command.
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
    """A server process with a log file.

    Args:
        command: Program and arguments.
        environment: All of its environment variables.
        log_file: Where its output goes; None = a temporary file, removed by `close`.
    """

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


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- the supervisor


def supervise(grace_seconds: float, command: Sequence[str]) -> int:
    """Run `command` until it ends or has to; its exit code, or 128 + the number of the signal that ended it."""
    reasons_to_end: list[str] = []  # not an Event: a signal handler that sets one can wait for its own thread for ever
    signal.signal(signal.SIGTERM, lambda *_: reasons_to_end.append("SIGTERM"))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=False)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent is to notice when the command closes the other end
    threading.Thread(target=_wait_for_end_of_stdin, args=(reasons_to_end,), daemon=True).start()
    while child.poll() is None and not reasons_to_end:
        time.sleep(_POLL_SECONDS)
    # Also what a command that was killed has left behind: Python's resource tracker needs a moment, in which it removes
    # their shared memory.
    deadline = time.monotonic() + grace_seconds
    is_left = grace_seconds > 0 and _signal_group(child.pid, signal.SIGTERM)
    while is_left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        child.poll()  # a process that has ended belongs to its group until it is waited for
        is_left = _signal_group(child.pid, 0)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _wait_for_end_of_stdin(reasons_to_end: list[str]) -> None:
    while os.read(0, 4096):
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
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
