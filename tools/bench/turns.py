"""Two training loops in one process, one step at a time in turn."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class Turns:
    """Runs loops that cannot be called step by step, each in a thread of its own, of which one computes at a time.

    A loop calls `hand_over` after each of its turns; it returns when all others have had theirs. A loop that raises
    ends the others at their next turn.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._queue: list[threading.Thread] = []
        self._failed: BaseException | None = None

    def run(self, *loops: Callable[[], Any]) -> None:
        """Run all loops to their ends; the first of them in this thread.

        Raises:
            The exception of the first loop that failed.
        """
        threads = torch.get_num_threads()
        others = [threading.Thread(target=self._play, args=(loop, threads), daemon=True) for loop in loops[1:]]
        self._queue = [threading.current_thread(), *others]
        for thread in others:
            thread.start()
        self._play(loops[0], threads)
        for thread in others:
            thread.join()
        if self._failed is not None:
            raise self._failed

    def hand_over(self) -> None:
        """Let the others have their turns."""
        with self._condition:
            self._queue.append(self._queue.pop(0))
            self._condition.notify_all()
        self._wait()

    def _wait(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._failed or self._queue[0] is threading.current_thread())
            if self._failed is not None:
                raise RuntimeError("another loop failed") from self._failed

    def _play(self, loop: Callable[[], Any], threads: int) -> None:
        try:
            self._wait()
            torch.set_num_threads(threads)  # a setting of each thread
            loop()
        except BaseException as error:
            self._failed = self._failed or error
        finally:
            with self._condition:
                self._queue.remove(threading.current_thread())
                self._condition.notify_all()
