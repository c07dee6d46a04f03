"""Prefetch rollouts one step ahead: collect those of the next step in a thread while this step trains."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import asdict, fields
from typing import Any

from tealightning.types import RolloutBatch, SamplingConfig

Collected = tuple[RolloutBatch, dict[str, float]]
"""What `RolloutCollector.collect` returns."""


class OneStepAhead:
    """At most one collection under way."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._task: futures.Future[Collected] | None = None
        self._taken: dict[str, Any] | None = None

    def submit(self, ids: Sequence[str], collect: Callable[[], Collected]) -> None:
        """Start to collect the rollouts of the prompts `ids`, in a daemon thread, which an executor's is not: a request
        that never ends must not keep the process alive."""
        assert self._task is None, "what was collected is taken before more is"
        task: futures.Future[Collected] = futures.Future()

        def run() -> None:
            try:
                task.set_result(collect())
            except BaseException as error:  # raised where the result is taken
                task.set_exception(error)

        self._ids, self._task = list(ids), task
        threading.Thread(target=run, name="rollouts one step ahead", daemon=True).start()

    def wait(self) -> None:
        """Wait until the engine is idle."""
        if self._task is not None:
            futures.wait([self._task])

    def take(self, ids: Sequence[str]) -> Collected | None:
        """What was collected for the prompts `ids`; None if nothing was, or for others (then it is dropped). Raises
        whatever engine or reward raised."""
        self.wait()
        task, self._task, self._taken = self._task, None, None
        if task is None or self._ids != list(ids):
            return None
        self._taken = self._state_of(task)
        return task.result()

    def state(self, *, of_step_under_way: bool = False, wait: bool = True) -> dict[str, Any] | None:
        """What a checkpoint keeps: what was collected for the next step, or, to repeat the step under way, what was
        taken for that. None if nothing was, or (without `wait`) if it is not there yet."""
        if of_step_under_way:
            return self._taken
        if wait:
            self.wait()
        if self._task is None or not self._task.done() or self._task.exception() is not None:
            return None
        return self._state_of(self._task)

    def load_state(self, state: dict[str, Any]) -> None:
        """Have what was collected before a checkpoint ready to be taken."""
        values = state["rollouts"] | {"sampling": SamplingConfig(**state["rollouts"]["sampling"])}
        collected = RolloutBatch(**values), dict(state["seconds"])
        self.submit(state["ids"], lambda: collected)

    def _state_of(self, task: futures.Future[Collected]) -> dict[str, Any]:
        """Plain values and the collected tensors themselves, not copies."""
        rollouts, seconds = task.result()
        values = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)} | {"sampling": asdict(rollouts.sampling)}
        return {"ids": list(self._ids), "rollouts": values, "seconds": dict(seconds)}
