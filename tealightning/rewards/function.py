"""Reward computed by a Python function of the user."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from tealightning.errors import UserError
from tealightning.registry import register
from tealightning.rewards.base import Reward, as_scores, bisect_failures, check_seconds
from tealightning.rewards.function_worker import (
    FunctionRaisedError,
    FunctionWorker,
    WorkerDiedError,
    WorkerStartError,
    WorkerTimeoutError,
)
from tealightning.rewards.user_function import call_function, function_path, import_function
from tealightning.types import Prompt, RewardScores

_TIMEOUTS_OF_A_DEADLINE = 10.0  # enough to find one completion in 500 that hangs


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
        _check_settings(timeout_seconds, deadline_seconds, on_error)
        self.on_error = on_error
        self._runner: _InProcess | FunctionWorker
        if timeout_seconds is None:
            self._runner = _InProcess(function)
        else:
            self._runner = FunctionWorker(function_path(function), timeout_seconds=timeout_seconds)
        self._budget_seconds = deadline_seconds or _TIMEOUTS_OF_A_DEADLINE * (timeout_seconds or float("inf"))
        self._is_tolerant = timeout_seconds is not None or on_error == "unscored"
        self._closes = 0

    @property
    def name(self) -> str:
        """The name of the function."""
        return self._runner.name

    def setup(self, device: torch.device) -> None:
        """Start the worker process, if there is one."""
        self._runner.start()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
        """What the function returns.

        Raises:
            RuntimeError: if the function raises; its own exception is the cause.
        """
        return self._runner.call(prompts=prompts, completions=completions, metadata=metadata)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """The scores, checked. In a process of its own, or with `on_error="unscored"`, a failure costs only the
        completions that cause it.

        Raises:
            ValueError: for another number of values, or something that is no number, with `on_error="raise"`.
            RuntimeError: if the function raises, with `on_error="raise"`; its own exception is the cause.
        """
        if not self._is_tolerant:
            return super().__call__(prompts, completions, metadata)
        call = _TolerantCall(self._runner, prompts, completions, metadata, raises=self.on_error == "raise")
        closes = self._closes
        total = call.scores(lambda: self._closes == closes and call.seconds < self._budget_seconds)
        if call.problem is not None:
            self._report(call)
        return RewardScores(total=total, components={self.name: total}, counts={self.name: call.counts})

    def _report(self, call: "_TolerantCall") -> None:
        if self.problem is None:
            warnings.warn(
                f"{call.problem}. {call.counts['unscored']} completions of the call have no score. Later failures are "
                "counted, without this warning.",
                stacklevel=3,
            )
        self.problem = call.problem

    def close(self) -> None:
        """End the worker process, if there is one."""
        self._closes += 1
        self._runner.close()


class _InProcess:
    """Calls a function in this process, as `FunctionWorker` does in another one."""

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.function = import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise UserError(f"function must be a path to a function or a callable, got {self.function!r}.")
        self.name: str = getattr(self.function, "__name__", type(self.function).__name__)

    def start(self) -> None:
        pass

    def call(self, **arguments: Sequence[Any]) -> Any:
        try:
            return call_function(self.function, **arguments)
        except Exception as error:  # whatever the user's code raises gets the context that its traceback lacks
            raise FunctionRaisedError(
                self.name, type(error).__name__, len(arguments["completions"]), str(error)
            ) from error

    def close(self) -> None:
        pass


class _TolerantCall:
    """One call of the reward that costs only the completions that the function fails on.

    Attributes:
        counts: Number of failures of each kind, and of completions without a score.
        problem: Message of the last failure; None = there was none.
        seconds: Time spent in the function so far.
    """

    def __init__(self, runner: _InProcess | FunctionWorker, *columns: Sequence[Any], raises: bool) -> None:
        self._runner = runner
        self._columns = dict(zip(("prompts", "completions", "metadata"), columns, strict=True))
        self._raises = raises
        self.counts = dict.fromkeys(("timeouts", "crashes", "errors", "unscored"), 0)
        self.problem: str | None = None
        self.seconds = 0.0

    def scores(self, go_on: Callable[[], bool]) -> torch.Tensor:
        """[B] float64; NaN where the function failed."""
        count = len(self._columns["completions"])
        scored = bisect_failures(range(count), self._attempt, go_on)
        self.counts["unscored"] = count - len(scored)
        return torch.tensor([scored.get(row, float("nan")) for row in range(count)], dtype=torch.float64)

    def _attempt(self, rows: Sequence[int]) -> Sequence[float] | None:
        started = time.monotonic()
        try:
            values = self._runner.call(**{name: [column[i] for i in rows] for name, column in self._columns.items()})
            source = f"reward {self._runner.name!r}"
            return as_scores(values, expected=len(rows), source=source).tolist()
        except WorkerStartError:
            raise
        except WorkerTimeoutError as error:
            kind, self.problem = "timeouts", str(error)
        except WorkerDiedError as error:
            kind, self.problem = "crashes", str(error)
        except (FunctionRaisedError, ValueError) as error:
            if self._raises:
                raise
            kind, self.problem = "errors", str(error)
        finally:
            self.seconds += time.monotonic() - started
        self.counts[kind] += 1
        return None


def _check_settings(timeout_seconds: float | None, deadline_seconds: float | None, on_error: str) -> None:
    for name, seconds in (("timeout_seconds", timeout_seconds), ("deadline_seconds", deadline_seconds)):
        if seconds is not None:
            check_seconds(name, seconds)
    if deadline_seconds is not None and timeout_seconds is None:
        raise UserError("deadline_seconds has no effect without timeout_seconds: set that too.")
    if on_error not in ("raise", "unscored"):
        raise UserError(f"on_error must be raise or unscored, got {on_error!r}.")
