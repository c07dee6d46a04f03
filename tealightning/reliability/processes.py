"""Server process that ends with this one."""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_END_SECONDS = 30.0  # for the supervisor to end the server; it kills after 10
_TAIL_LINES = 25


class LocalServer:
    """A command that runs until `close`, or until this process ends, even by SIGKILL: see `supervise.py`.

    Args:
        command: To run.
        environment: All of its environment variables.
        log_file: Where its output goes; None = a temporary file, removed by `close`.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log_file: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="tealightning-server-")
        self.log_file = log_file or Path(self._temporary.name) / "server.log"
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("supervise.py")), *command],
                stdin=subprocess.PIPE,  # closed by the kernel when this process ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard is for the trainer, which then closes this
            )

    def exit_code(self, *, wait_seconds: float = 0.0) -> int | None:
        """None while it runs, and for so long."""
        try:
            return self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self) -> str:
        """The last lines of its output."""
        lines = (
            self.log_file.read_text(encoding="utf-8", errors="replace").splitlines() if self.log_file.exists() else []
        )
        return "\n".join(lines[-_TAIL_LINES:])

    def close(self) -> None:
        """End it and wait until it has; safe to call twice."""
        assert self._process.stdin is not None
        self._process.terminate()  # a forked child of this process may hold the pipe open
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._temporary.cleanup()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
