"""One step ahead: the rollouts of the next step are collected in a thread while this step trains."""

import threading
from collections.abc import Callable, Sequence

from tealightning.types import RolloutBatch

Collected = tuple[RolloutBatch, dict[str, float]]
"""What `RolloutCollector.collect` returns."""


class OneStepAhead:
    """At most one collection under way."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._task: _Task | None = None

    def submit(self, ids: Sequence[str], collect: Callable[[], Collected]) -> None:
        """Start to collect the rollouts of the prompts `ids`."""
        assert self._task is None, "what was collected is taken before more is"
        self._ids, self._task = list(ids), _Task(collect)
        self._task.start()

    def wait(self) -> None:
        """Until the engine is idle."""
        if self._task is not None:
            self._task.join()

    def take(self, ids: Sequence[str]) -> Collected | None:
        """What was collected for the prompts `ids`; None if nothing was, or for others (then it is dropped).

        Raises:
            Exception: whatever engine or reward raised.
        """
        task, self._task = self._task, None
        if task is None:
            return None
        task.join()
        return task.result() if self._ids == list(ids) else None

    def drop(self) -> None:
        """Forget what is under way, without waiting: its thread ends with the process at the latest."""
        self._task = None


class _Task(threading.Thread):
    """A daemon, unlike the threads of an executor: a request that never ends must not keep the process alive."""

    def __init__(self, collect: Callable[[], Collected]) -> None:
        super().__init__(name="rollouts one step ahead", daemon=True)
        self._collect = collect
        self._collected: Collected | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._collected = self._collect()
        except BaseException as error:  # raised where the result is taken
            self._error = error

    def result(self) -> Collected:
        """Of a thread that has ended."""
        if self._error is not None:
            raise self._error
        assert self._collected is not None
        return self._collected
