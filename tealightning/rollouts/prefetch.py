"""Prefetch rollouts one step ahead: collect those of the next step in a thread while this step trains."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, fields
from typing import Any

from tealightning.types import RolloutBatch, SamplingConfig

Collected = tuple[RolloutBatch, dict[str, float]]
"""What `RolloutCollector.collect` returns."""


class OneStepAhead:
    """At most one collection under way."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._task: Future[Collected] | None = None
        self._taken: dict[str, Any] | None = None

    def submit(self, ids: Sequence[str], collect: Callable[[], Collected]) -> None:
        """Start to collect the rollouts of the prompts `ids`."""
        assert self._task is None, "what was collected is taken before more is"
        self._ids, self._task = list(ids), _started(collect)

    def wait(self) -> None:
        """Wait until the engine is idle."""
        if self._task is not None:
            futures.wait([self._task])

    def take(self, ids: Sequence[str]) -> Collected | None:
        """What was collected for the prompts `ids`; None if nothing was, or for others (then it is dropped).

        Raises:
            Exception: whatever engine or reward raised.
        """
        task, self._task, self._taken = self._task, None, None
        if task is None:
            return None
        futures.wait([task])
        if self._ids != list(ids):
            return None
        collected = task.result()
        self._taken = collected_state(self._ids, collected)
        return collected

    def state(self, *, of_step_under_way: bool = False, wait: bool = True) -> dict[str, Any] | None:
        """What a checkpoint keeps: what was collected for the next step, or, to repeat the step under way, what was
        taken for that. None if nothing was, or (without `wait`) if it is not there yet."""
        if of_step_under_way:
            return self._taken
        if self._task is None:
            return None
        if wait:
            self.wait()
        is_there = self._task.done() and self._task.exception() is None
        return collected_state(self._ids, self._task.result()) if is_there else None

    def load_state(self, state: dict[str, Any]) -> None:
        """Have what was collected before a checkpoint ready to be taken."""
        ids, collected = collected_of(state)
        self.submit(ids, lambda: collected)


def collected_state(ids: Sequence[str], collected: Collected) -> dict[str, Any]:
    """Rollouts of the prompts `ids` as plain values and tensors (the same ones, not copies)."""
    rollouts, seconds = collected
    values = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)} | {"sampling": asdict(rollouts.sampling)}
    return {"ids": list(ids), "rollouts": values, "seconds": dict(seconds)}


def collected_of(state: dict[str, Any]) -> tuple[list[str], Collected]:
    """The inverse of `collected_state`."""
    values = state["rollouts"] | {"sampling": SamplingConfig(**state["rollouts"]["sampling"])}
    return list(state["ids"]), (RolloutBatch(**values), dict(state["seconds"]))


def _started(collect: Callable[[], Collected]) -> Future[Collected]:
    """Run `collect` in a daemon thread, which an executor's is not: a request that never ends must not keep the process
    alive."""
    future: Future[Collected] = Future()

    def run() -> None:
        try:
            future.set_result(collect())
        except BaseException as error:  # raised where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, name="rollouts one step ahead", daemon=True).start()
    return future
