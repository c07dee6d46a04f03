"""Run a Python function in a process of its own, with a time limit."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any

from tealightning.errors import UserError
from tealightning.reliability.processes import ChildProcess
from tealightning.rewards import user_function

_START_SECONDS = 300.0  # to import the function, which may load a model


class FunctionRaisedError(RuntimeError):
    """The function raised."""

    def __init__(self, name: str, error: str, count: int, message: str) -> None:
        super().__init__(f"reward function {name!r} raised {error} on {count} completions: {message}")


class WorkerStartError(UserError):
    """The function cannot be imported in its process."""


class WorkerTimeoutError(RuntimeError):
    """The function took too long; its process has been ended."""


class WorkerDiedError(RuntimeError):
    """The function's process ended while it was at work."""


class FunctionWorker:
    """Calls a function by its path in another process, which is started when needed.

    The process inherits this one's environment variables, folder and import path. What the function prints goes to
    stderr. A call that takes longer than `timeout_seconds` ends the process and all that it started.

    Args:
        path: See `import_function`.
        timeout_seconds: Longest time for one call.
    """

    def __init__(self, path: str, *, timeout_seconds: float) -> None:
        self.path = path
        self.name = path.replace(":", ".").rpartition(".")[2]
        self.timeout_seconds = timeout_seconds
        self._process: _WorkerProcess | None = None
        self._one_call = threading.Lock()

    def start(self) -> None:
        """Start the process and import the function there, unless that is done.

        Raises:
            WorkerStartError: if the function cannot be imported there.
        """
        self._running_process()

    def call(self, **arguments: Sequence[Any]) -> list[float | None]:
        """What the function returns for keyword arguments.

        Raises:
            ValueError: if an argument cannot be sent to another process, or it returns no numbers.
            FunctionRaisedError: if it raises.
            WorkerTimeoutError: if it takes longer than `timeout_seconds`.
            WorkerDiedError: if its process ends.
        """
        count = len(arguments["completions"])
        with self._one_call:
            process = self._running_process()
            try:
                kind, *details = process.exchange(arguments, self.timeout_seconds)
            except (PicklingError, TypeError, AttributeError) as error:
                raise UserError(f"metadata holds what cannot be sent to the worker process: {error}") from error
            except (WorkerTimeoutError, WorkerDiedError) as error:
                raise type(error)(f"reward function {self.name!r} on {count} completions: {error}") from error
        if kind == "raised":
            error_type, message, trace = details
            raise FunctionRaisedError(self.name, error_type, count, message) from _TracebackOfWorker(trace)
        if kind == "invalid":
            raise UserError(
                f"reward {self.name!r} must return one number per completion (None or NaN = unscorable): {details[0]}"
            )
        return details[0]

    def close(self) -> None:
        """End the process; a later call starts another one. Also from another thread, during a call."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _running_process(self) -> "_WorkerProcess":
        if self._process is not None and self._process.is_alive():
            return self._process
        self.close()
        process = self._process = _WorkerProcess()
        try:
            kind, *details = process.exchange({"sys_path": sys.path, "function": self.path}, _START_SECONDS)
        except (WorkerTimeoutError, WorkerDiedError) as error:
            raise WorkerStartError(f"function: importing {self.path} in the worker process failed: {error}") from error
        if kind != "ready":
            process.close()
            error_type, message, trace = details
            raise WorkerStartError(
                f"function: {self.path} cannot be imported in the worker process: {error_type}: {message}"
            ) from _TracebackOfWorker(trace)
        return process


class _TracebackOfWorker(Exception):
    """The cause of an error that was raised in the other process, as text."""

    def __str__(self) -> str:
        return f"in the worker process\n{self.args[0]}"


class _WorkerProcess(ChildProcess):
    """The process that runs `user_function.py`, and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours.detach())
        self._closed = threading.Event()
        with theirs:
            super().__init__(
                # -P: the script's folder holds an `http.py`, which is not the standard library's
                [sys.executable, "-P", user_function.__file__, str(theirs.fileno())],
                grace_seconds=0.0,
                stdout=2,
                pass_fds=[theirs.fileno()],
            )

    def is_alive(self) -> bool:
        return not self._closed.is_set() and self.exit_code() is None

    def exchange(self, message: Any, seconds: float) -> Any:
        """The answer to `message`. Whatever is raised, the process has been ended: no later call gets this answer.

        Raises:
            WorkerTimeoutError: without an answer in time.
            WorkerDiedError: if the process ends.
        """
        late = threading.Event()

        def expire() -> None:
            late.set()
            self.close()  # which also wakes the wait below

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            self._channel.send(message)
            return self._channel.recv()
        except BaseException as error:
            self.close()
            if not isinstance(error, EOFError | OSError):
                raise
            if late.is_set():
                raise WorkerTimeoutError(f"it took longer than {seconds:g} s") from error
            raise WorkerDiedError(f"its process ended ({self._ending()})") from error
        finally:
            timer.cancel()

    def close(self) -> None:
        self._closed.set()
        with (
            contextlib.suppress(OSError),  # it is closed at the other end
            socket.socket(fileno=os.dup(self._channel.fileno())) as ours,
        ):
            ours.shutdown(socket.SHUT_RDWR)
        super().close()

    def _ending(self) -> str:
        code = self.exit_code()
        if code is None or code <= 128:
            return f"exit code {code}"
        hint = ", perhaps for want of memory" if code == 128 + signal.SIGKILL else ""
        return f"{signal.Signals(code - 128).name}{hint}"
