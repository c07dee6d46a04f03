"""One call of `HTTPReward`: batches, retries, the deadline, and scores that are kept in any case."""

import hashlib
import math
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from tealightning.rewards.base import bisect_failures
from tealightning.rewards.http_client import (
    BadAnswerError,
    FailedAnswerError,
    RequestTimeoutError,
    RewardClient,
    UnavailableError,
    scores_by_id,
)

_RETRIES_OF_HALVES = 1
_SHARE_OF_DEADLINE_IN_OUTAGE = 0.05
_LOOK_SECONDS = 1.0
_LONG_SECONDS = 10.0


@dataclass(kw_only=True, slots=True, frozen=True)
class RetryPolicy:
    """How to go on asking; see `HTTPReward`."""

    batch_size: int
    concurrency: int
    deadline_seconds: float
    retries: int
    backoff_seconds: float
    max_backoff_seconds: float

    def wait_seconds(self, attempt: int, rng: random.Random) -> float:
        """Full jitter: uniform on `[0, min(max_backoff_seconds, backoff_seconds * 2**attempt)]`, so that many clients
        spread out."""
        return rng.uniform(0.0, min(self.max_backoff_seconds, self.backoff_seconds * 2.0 ** min(attempt, 60)))


class OutageClock:
    """Since when a server has given no scores, over all calls: a server that is gone is waited for once, not in every
    call."""

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._since: float | None = None
        self._reported = False

    def start(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def stop(self) -> None:
        self._since, self._reported = None, False

    def report(self, problem: str | None) -> None:
        """Warn, once an outage, when it is a long one."""
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
        return min(usual, max(since + self._most_seconds, started + _SHARE_OF_DEADLINE_IN_OUTAGE * self._most_seconds))


class ScoringCall:
    """Scores items by id, in threads. They are daemons: a request that does not end keeps no process alive.

    Args:
        client: Sends the requests.
        items: JSON of each item by its id.
        policy: How to go on after failures.
        outage: Shared by all calls.
        slots: Shared by all calls: a request takes one.

    Attributes:
        counts: Number of retries, of failures of each kind, and of completions without a score.
        problem: Why completions were given up; None = none were.
    """

    def __init__(
        self,
        client: RewardClient,
        items: Mapping[str, str],
        *,
        policy: RetryPolicy,
        outage: OutageClock,
        slots: threading.Semaphore,
    ) -> None:
        self._client = client
        self._items = items
        self._policy = policy
        self._outage = outage
        self._slots = slots
        self._rng = random.Random()  # of its own: the global stream belongs to the training
        self._changed = threading.Condition()
        self._scores: dict[str, float] = {}
        self._error: BaseException | None = None
        self._over = threading.Event()
        keys, size = list(items), policy.batch_size
        self._batches = deque(keys[start : start + size] for start in range(0, len(keys), size))
        self._threads_left = min(policy.concurrency, len(self._batches))
        self._started = time.monotonic()
        self.counts = dict.fromkeys(("retries", "timeouts", "errors", "unscored"), 0)
        self.problem: str | None = None
        self._last_error: str | None = None

    def run(self) -> dict[str, float]:
        """Score by id, without those that could not be had before the deadline.

        Raises:
            RewardServerError: if the server refuses.
        """
        for _ in range(self._threads_left):
            threading.Thread(target=self._work, name="reward requests", daemon=True).start()
        try:
            with self._changed:
                while self._threads_left and self._error is None and self._goes_on():
                    self._changed.wait(min(_LOOK_SECONDS, max(0.0, self._seconds_left())))
                    self._outage.report(self._last_error)
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
        return self._outage.deadline(self._started) - time.monotonic()

    # ---------------------------------------------------------------- in the threads

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with self._client.connection() as connection:
                while self._goes_on() and (batch := self._next_batch()):
                    self._score(connection, batch)
        except BaseException as raised:  # raised again where the call waits
            error = raised
        with self._changed:
            self._threads_left -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _next_batch(self) -> list[str]:
        """Empty = there is none."""
        with self._changed:
            return self._batches.popleft() if self._batches else []

    def _score(self, connection: httpx.HTTPTransport, batch: Sequence[str]) -> None:
        """Ask for a batch until it is scored; a batch that the server fails at is asked for in halves."""
        retries = iter([self._policy.retries])

        def attempt(keys: Sequence[str]) -> Sequence[float] | None:
            return self._ask_until_scored(connection, keys, next(retries, _RETRIES_OF_HALVES))

        bisect_failures(batch, attempt, self._goes_on)

    def _ask_until_scored(
        self, connection: httpx.HTTPTransport, keys: Sequence[str], retries: int
    ) -> Sequence[float] | None:
        """Scores of `keys`, NaN where there is none; None = the server failed at them more than `retries` times."""
        waits = failures = 0
        while (missing := [key for key in keys if key not in self._scores]) and self._goes_on():
            retry_after = 0.0
            try:
                self._ask(connection, missing)
                if all(key in self._scores for key in keys):
                    break
                raise BadAnswerError("the server left completions out")
            except UnavailableError as error:  # it may come back: only the deadline ends this
                retry_after = error.retry_after
                self._record("errors", error)
            except FailedAnswerError as error:
                failures += 1
                self._record("timeouts" if isinstance(error, RequestTimeoutError) else "errors", error)
            delay = retry_after + self._policy.wait_seconds(waits, self._rng)
            if failures > retries or delay >= self._seconds_left() or self._over.wait(delay):
                self.problem = self._last_error
                return None
            waits += 1
            self._count("retries")
        return [self._scores.get(key, math.nan) for key in keys]

    def _ask(self, connection: httpx.HTTPTransport, keys: Sequence[str]) -> None:
        """One request; keeps what it scored."""
        if not self._slots.acquire(timeout=max(0.0, self._seconds_left())):
            raise UnavailableError("earlier requests still wait for their answers")
        try:
            body = f'{{"items": [{", ".join(self._items[key] for key in keys)}]}}'.encode()
            digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
            content = self._client.post(connection, body, {"Idempotency-Key": digest})
        finally:
            self._slots.release()
        scores = scores_by_id(content, frozenset(keys))
        if scores:
            self._outage.stop()
        with self._changed:
            self._scores |= scores

    def _record(self, kind: str, error: Exception) -> None:
        self._outage.start()
        self._count(kind)
        self._last_error = str(error)

    def _count(self, kind: str) -> None:
        with self._changed:
            self.counts[kind] += 1
