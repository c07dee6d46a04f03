"""Guard process: ends this process when it is stuck and cleans up after it; see `guard_script.py`."""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

from tealightning.reliability import temp_dirs


class Guard:
    """Runs until `stop`, or until this process ends."""

    def __init__(self) -> None:
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # by number: what replaced `sys.stderr` may have none
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard_script.py")), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def expect(self, seconds: float | None, text: str) -> None:
        """This process calls again within `seconds`, or it is ended with `text`; None = whenever it likes."""
        self._send({"seconds": seconds, "text": text, "remove": temp_dirs.folders()})

    def stop(self) -> None:
        """It is needed no more; what is in `leftovers` is still in use, and stays."""
        self._send({"seconds": None, "text": "", "remove": []})
        self._process.kill()
        self._process.wait(30)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, order: dict[str, object]) -> None:
        assert self._process.stdin is not None
        # Written whole or not at all, since it is less than the 4,096 bytes that a pipe takes at once; and without
        # waiting, because a guard that does not read must not hold up what it guards.
        with contextlib.suppress(BrokenPipeError, BlockingIOError, ValueError):
            os.write(self._process.stdin.fileno(), json.dumps(order).encode() + b"\n")
