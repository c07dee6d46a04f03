"""One call of `HTTPReward`: batches, retries, the deadline, and scores that are kept in any case."""

import hashlib
import math
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tealightning.rewards.base import bisect_failures
from tealightning.rewards.http_client import (
    BadAnswerError,
    FailedAnswerError,
    RequestTimeoutError,
    UnavailableError,
    full_jitter,
    scores_by_id,
)

Post = Callable[[bytes, Mapping[str, str]], bytes]

_RETRIES_OF_HALVES = 1
_SHARE_OF_DEADLINE_IN_SILENCE = 0.05
_LOOK_SECONDS = 1.0
_LONG_SECONDS = 10.0


@dataclass(kw_only=True, slots=True, frozen=True)
class Persistence:
    """How to go on asking; see `HTTPReward`."""

    batch_size: int
    concurrency: int
    deadline_seconds: float
    retries: int
    backoff_seconds: float
    max_backoff_seconds: float


class Silence:
    """Since when a server has given no scores, over all calls: a server that is gone is waited for once, not in every
    call."""

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._since: float | None = None
        self._reported = False

    def begins(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def ends(self) -> None:
        self._since, self._reported = None, False

    def report(self, problem: str | None) -> None:
        """Warn, once a silence, when it is a long one."""
        if self._since is not None and not self._reported and time.monotonic() - self._since > _LONG_SECONDS:
            self._reported = True
            warnings.warn(
                f"No scores for {_LONG_SECONDS:g} s: {problem}. Asking again, for up to {self._most_seconds:g} s.",
                stacklevel=2,
            )

    def deadline(self, started: float) -> float:
        """Until when a call that began at `started` goes on."""
        usual, since = started + self._most_seconds, self._since
        if since is None:
            return usual
        return min(usual, max(since + self._most_seconds, started + _SHARE_OF_DEADLINE_IN_SILENCE * self._most_seconds))


class ScoringCall:
    """Scores items by id, in threads. They are daemons: a request that does not end keeps no process alive.

    Args:
        post: Sends a body with headers, returns that of the answer.
        items: JSON of each item by its id.
        persistence: How to go on.
        silence: Shared by all calls.
        slots: Shared by all calls: a request takes one.

    Attributes:
        counts: What happened, how often.
        problem: Why completions were given up; None = none were.
    """

    def __init__(
        self,
        post: Post,
        items: Mapping[str, str],
        *,
        persistence: Persistence,
        silence: Silence,
        slots: threading.Semaphore,
    ) -> None:
        self._post = post
        self._items = items
        self._persistence = persistence
        self._silence = silence
        self._slots = slots
        self._rng = random.Random()  # of its own: the global stream belongs to the training
        self._changed = threading.Condition()
        self._scores: dict[str, float] = {}
        self._error: BaseException | None = None
        self._over = threading.Event()
        keys, size = list(items), persistence.batch_size
        self._batches = deque(keys[start : start + size] for start in range(0, len(keys), size))
        self._workers = min(persistence.concurrency, len(self._batches))
        self._started = time.monotonic()
        self.counts = dict.fromkeys(("retries", "timeouts", "errors", "unscored"), 0)
        self.problem: str | None = None
        self._last_error: str | None = None

    def run(self) -> dict[str, float]:
        """Score by id, without those that could not be had before the deadline.

        Raises:
            RewardServerError: if the server refuses.
        """
        for _ in range(self._workers):
            threading.Thread(target=self._work, name="reward requests", daemon=True).start()
        try:
            with self._changed:
                while self._workers and self._error is None and self._goes_on():
                    self._changed.wait(min(_LOOK_SECONDS, max(0.0, self._seconds_left())))
                    self._silence.report(self._last_error)
        finally:
            self._over.set()
        with self._changed:
            if self._error is not None:
                raise self._error
            self.counts["unscored"] = len(self._items) - len(self._scores)
            self.problem = self.problem or self._last_error
            return dict(self._scores)

    def stop(self) -> None:
        """Have `run` return what there is; from another thread."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()

    def _goes_on(self) -> bool:
        return not self._over.is_set() and self._seconds_left() > 0

    def _seconds_left(self) -> float:
        return self._silence.deadline(self._started) - time.monotonic()

    # ---------------------------------------------------------------- in the threads

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            while self._goes_on() and (batch := self._next_batch()):
                self._score(batch)
        except BaseException as raised:  # raised again where the call waits
            error = raised
        with self._changed:
            self._workers -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _next_batch(self) -> list[str]:
        """Empty = there is none."""
        with self._changed:
            return self._batches.popleft() if self._batches else []

    def _score(self, batch: Sequence[str]) -> None:
        """Ask for a batch until it is scored; a batch that the server fails at is asked for in halves."""
        retries = iter([self._persistence.retries])

        def attempt(keys: Sequence[str]) -> Sequence[float] | None:
            return self._ask_until_scored(keys, next(retries, _RETRIES_OF_HALVES))

        bisect_failures(batch, attempt, self._goes_on)

    def _ask_until_scored(self, keys: Sequence[str], retries: int) -> Sequence[float] | None:
        """Scores of `keys`, NaN where there is none; None = the server failed at them more than `retries` times."""
        waits = failures = 0
        while (missing := [key for key in keys if key not in self._scores]) and self._goes_on():
            retry_after, failed = 0.0, True
            try:
                self._ask(missing)
            except UnavailableError as error:  # it may come back: only the deadline ends this
                retry_after, failed = error.retry_after, False
                self._note("errors", error)
            except RequestTimeoutError as error:
                self._note("timeouts", error)
            except (FailedAnswerError, BadAnswerError) as error:
                self._note("errors", error)
            else:
                if all(key in self._scores for key in keys):
                    break
                self._note("errors", BadAnswerError("the server left completions out"))
            failures, waits = failures + failed, waits + 1
            if failures > retries or not self._pause(waits - 1, retry_after):
                self.problem = self._last_error
                return None
            self._count("retries")
        return [self._scores.get(key, math.nan) for key in keys]

    def _ask(self, keys: Sequence[str]) -> None:
        """One request; keeps what it scored."""
        if not self._slots.acquire(timeout=max(0.0, self._seconds_left())):
            raise UnavailableError("earlier requests still wait for their answers")
        try:
            body = f'{{"items": [{", ".join(self._items[key] for key in keys)}]}}'.encode()
            digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
            content = self._post(body, {"Content-Type": "application/json", "Idempotency-Key": digest})
        finally:
            self._slots.release()
        scores = scores_by_id(content, frozenset(keys))
        if scores:
            self._silence.ends()
        with self._changed:
            self._scores |= scores

    def _pause(self, attempt: int, retry_after: float) -> bool:
        """Wait before the next request; False = there is no time for another."""
        delay = retry_after + full_jitter(
            attempt,
            first_seconds=self._persistence.backoff_seconds,
            most_seconds=self._persistence.max_backoff_seconds,
            rng=self._rng,
        )
        return delay < self._seconds_left() and not self._over.wait(delay)

    def _note(self, kind: str, error: Exception) -> None:
        self._silence.begins()
        self._count(kind)
        self._last_error = str(error)

    def _count(self, kind: str) -> None:
        with self._changed:
            self.counts[kind] += 1
