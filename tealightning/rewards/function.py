"""Reward computed by a Python function of the user, in this process or, with a time limit, in one of its own."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any, Literal

import torch

from tealightning.checks import check_choice, check_positive
from tealightning.errors import UserError
from tealightning.registry import register
from tealightning.reliability.processes import ChildProcess
from tealightning.rewards import user_function
from tealightning.rewards.base import Metadata, Reward, bisect_failures
from tealightning.types import Prompt, RewardScores

_TIMEOUTS_OF_A_DEADLINE = 10.0  # enough to find one completion in 500 that hangs
_START_SECONDS = 300.0  # to import the function, which may load a model


class FunctionRaisedError(RuntimeError):
    """The function raised."""

    def __init__(self, name: str, error: str, count: int, message: str) -> None:
        super().__init__(f"reward function {name!r} raised {error} on {count} completions: {message}")


class WorkerStartError(UserError):
    """The function cannot be imported in its process."""


class WorkerFailedError(RuntimeError):
    """The function's process ended while it was at work ("crashes"), or was ended for want of time ("timeouts")."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@register
class FunctionReward(Reward):
    """Calls `function(prompts=..., completions=..., metadata=...)`, which returns one number per completion.

    `None` and NaN mean "could not be scored". The function may be `async`. It gets as many prompts and metadata as
    completions: row i of each belongs to completion i.

    Args:
        function: `package.module:function`, `package.module.function`, `path/to/file.py:function` or a callable.
        timeout_seconds: Longest time for one call. The function then runs in a process of its own, which is ended and
            started again when it hangs or crashes. None = in this process, without a limit.
        deadline_seconds: With a timeout: how long the halves of a batch that hung or crashed are tried, to score all
            but the completions that it failed on. None = 10 times `timeout_seconds`.
        on_error: `raise`: what the function raises ends the run. `unscored`: the completions that it raises on are
            unscorable (NaN), found by trying the halves of the batch.

    Raises:
        ValueError: if there is no such function, or another process could not import it.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        timeout_seconds: float | None = None,
        deadline_seconds: float | None = None,
        on_error: Literal["raise", "unscored"] = "raise",
    ) -> None:
        if deadline_seconds is not None:
            check_positive("deadline_seconds", deadline_seconds)
            if timeout_seconds is None:
                raise UserError("deadline_seconds has no effect without timeout_seconds: set that too.")
        self.on_error = check_choice("on_error", on_error, ("raise", "unscored"))
        self._given = function
        self._path = ""  # of the function, if a process of its own is to call it
        if timeout_seconds is None:
            self._function = user_function.import_function(function)
            self._name = getattr(self._function, "__name__", type(self._function).__name__)
        else:
            self._timeout_seconds = check_positive("timeout_seconds", timeout_seconds)
            self._path = user_function.function_path(function)
            self._name = self._path.replace(":", ".").rpartition(".")[2]
        self._budget_seconds = deadline_seconds or _TIMEOUTS_OF_A_DEADLINE * (timeout_seconds or math.inf)
        self._process: _WorkerProcess | None = None
        self._one_call = threading.Lock()
        self._closes = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in a process that is spawned, imports the function by its path and has a worker of its own."""
        state = self.__dict__ | {"_process": None}
        del state["_one_call"]
        if isinstance(self._given, str):
            state.pop("_function", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._one_call = threading.Lock()
        if not self._path:
            self._function = user_function.import_function(self._given)

    @property
    def name(self) -> str:
        """The name of the function."""
        return self._name

    def setup(self, device: torch.device) -> None:
        """Start the worker process, if there is to be one."""
        if self._path:
            self._running_process()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> list[float]:
        """What the function returns, as floats. A RuntimeError says that it raised, its own exception being the cause,
        or that its process failed; a ValueError that metadata cannot be sent there, or no numbers came back."""
        scores, problems = self._values(prompts, completions, metadata)
        if problems:
            raise self._no_numbers(problems)
        return scores

    def _values(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata
    ) -> tuple[list[float], dict[int, str]]:
        """Scores, and what is wrong with those that are no numbers, by their place."""
        columns = {"prompts": prompts, "completions": completions, "metadata": metadata}
        count = len(completions)  # before the user's code, which may change the list
        if self._path:
            return self._score_in_process(columns, count)
        try:
            return user_function.read_scores(user_function.call_function(self._function, **columns), count)
        except user_function.NoScoresError as error:
            raise UserError(f"reward {self.name!r} {error}") from error.__cause__
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what user code raises, SystemExit included, is its failure and not the end
            message = user_function.message_of(error)
            raise FunctionRaisedError(self.name, type(error).__name__, count, message) from error

    def _no_numbers(self, problems: dict[int, str]) -> UserError:
        return UserError(f"reward {self.name!r} {user_function.no_numbers(*problems.values())}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> RewardScores:
        """The scores, checked. In a process of its own, or with `on_error="unscored"`, a failure costs only the
        completions that cause it. With `on_error="raise"`, a ValueError says that something else than a number per
        completion was returned, and a RuntimeError, caused by the function's own exception, that it raised."""
        if not self._path and self.on_error == "raise":
            return super().__call__(prompts, completions, metadata)
        counts = dict.fromkeys(("timeouts", "crashes", "errors", "unscored"), 0)
        problem, no_numbers = "", 0

        def attempt(rows: Sequence[int]) -> Sequence[float] | None:
            nonlocal problem, no_numbers
            try:
                values, problems = self._values(
                    [prompts[i] for i in rows], [completions[i] for i in rows], [metadata[i] for i in rows]
                )
                if problems and self.on_error == "raise":
                    raise self._no_numbers(problems)
                if problems:  # the fault of these completions alone: no need to look for it in halves
                    counts["errors"] += 1
                    no_numbers += len(problems)
                    problem = str(self._no_numbers(problems))
                return values
            except WorkerStartError:
                raise
            except (WorkerFailedError, FunctionRaisedError, ValueError) as error:
                kind = getattr(error, "kind", "errors")
                if kind == "errors" and self.on_error == "raise":
                    raise
                counts[kind] += 1
                problem = str(error)
            return None

        closes, deadline = self._closes, time.monotonic() + self._budget_seconds
        scored = bisect_failures(
            range(len(completions)), attempt, lambda: self._closes == closes and time.monotonic() < deadline
        )
        counts["unscored"] = len(completions) - len(scored) + no_numbers
        if problem:
            self.report_unscored(problem, counts["unscored"])
        total = torch.tensor([scored.get(row, math.nan) for row in range(len(completions))], dtype=torch.float64)
        return RewardScores(total=total, components={self.name: total}, counts={self.name: counts})

    def close(self) -> None:
        """End the worker process, if there is one; a later call starts another. Also from another thread, in a call."""
        self._closes += 1
        self._end_process()

    # ---------------------------------------------------------------- the worker process

    def _running_process(self) -> "_WorkerProcess":
        if self._process is not None and self._process.is_alive():
            return self._process
        self._end_process()
        process = self._process = _WorkerProcess()
        try:
            kind, *details = process.exchange({"sys_path": sys.path, "function": self._path}, _START_SECONDS)
        except WorkerFailedError as error:
            raise WorkerStartError(f"function: importing {self._path} in the worker process failed: {error}") from error
        if kind != "ready":
            process.close()
            error_type, message, trace = details
            problem = f"function: {self._path} cannot be imported in the worker process: {error_type}: {message}"
            raise WorkerStartError(problem) from _TracebackOfWorker(trace)
        return process

    def _score_in_process(self, columns: dict[str, Sequence[Any]], count: int) -> tuple[list[float], dict[int, str]]:
        with self._one_call:
            process = self._running_process()
            try:
                kind, *details = process.exchange(columns, self._timeout_seconds)
            except (PicklingError, TypeError, AttributeError) as error:
                raise UserError(f"metadata holds what cannot be sent to the worker process: {error}") from error
            except WorkerFailedError as error:
                message = f"reward function {self.name!r} on {count} completions: {error}"
                raise WorkerFailedError(message, error.kind) from error
        if kind == "raised":
            error_type, message, trace = details
            raise FunctionRaisedError(self.name, error_type, count, message) from _TracebackOfWorker(trace)
        if kind == "invalid":
            raise UserError(f"reward {self.name!r} {details[0]}")
        scores, problems = details
        return scores, problems

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


class _TracebackOfWorker(Exception):
    """The cause of an error that was raised in the other process, as text."""

    def __str__(self) -> str:
        return f"in the worker process\n{self.args[0]}"


class _WorkerProcess(ChildProcess):
    """The process that runs `user_function.py`, and the socket to it. It inherits environment variables, folder and
    import path; what the function prints goes to stderr."""

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
        """The answer to `message`. Whatever is raised, the process has been ended: no later call gets this answer."""
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
                raise WorkerFailedError(f"it took longer than {seconds:g} s", "timeouts") from error
            raise WorkerFailedError(f"its process ended ({self._ending()})", "crashes") from error
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
        code = self.exit_code() or 0
        if code <= 128:
            return f"exit code {code}"
        hint = ", perhaps for want of memory" if code == 128 + signal.SIGKILL else ""
        return f"{signal.Signals(code - 128).name}{hint}"
