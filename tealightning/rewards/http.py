"""Reward computed by an HTTP server: batches, retries, the deadline, and scores that are kept in any case."""

import datetime
import hashlib
import itertools
import json
import math
import random
import threading
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import httpx
import torch
from torch import Tensor

from tealightning.checks import check_integer, check_not_negative, check_positive
from tealightning.errors import UserError
from tealightning.registry import register
from tealightning.rewards.base import Metadata, Reward, bisect_failures
from tealightning.rewards.http_client import (
    FailedAnswerError,
    RequestTimeoutError,
    RewardClient,
    UnavailableError,
    scores_by_id,
)
from tealightning.types import Prompt, RewardScores

_RETRIES_OF_HALVES = 1
_SHARE_IN_OUTAGE = 0.05  # of the deadline
_LOOK_SECONDS = 1.0
_LONG_SECONDS = 10.0


@register
class HTTPReward(Reward):
    """Posts `{"items": [{"id", "prompt", "completion", "metadata"}, ...]}` and reads
    `{"scores": [{"id", "score"}, ...]}`, in any order.

    A score belongs to the completion whose id it carries. Scores that have come are kept; what is missing is asked for
    again with the same id, and is unscorable (NaN) once the deadline has passed or the server failed at it too often.
    A server that cannot be reached or answers 429, 502, 503 or 504 is asked again until the deadline, one that answers
    otherwise wrongly `retries` times, then with halves of the batch. Another answer of 3xx or 4xx ends the run.

    Args:
        url: Address to post to; redirects and proxies are not followed.
        batch_size: Most completions of one request.
        concurrency: Most requests at a time, of each process of the training.
        timeout_seconds: Longest wait for one answer.
        deadline_seconds: Longest wait for all scores of a call, and for a server that is gone.
        retries: How often a batch is asked for again after a wrong answer or none in time.
        backoff_seconds: Longest wait before the first retry; it doubles with each and a random part of it is waited.
        max_backoff_seconds: Longest wait before any.
        token_env: Name of the environment variable with a bearer token; None = none is sent.
        metadata_keys: Columns of the data set to send; None = all.
        ca_file: Certificates (PEM) to trust instead of the usual ones.

    Raises:
        UserError: for a setting out of range, a `url` that is none, holds a password or would send the token
            unencrypted to another machine, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        concurrency: int = 8,
        timeout_seconds: float = 60.0,
        deadline_seconds: float = 600.0,
        retries: int = 5,
        backoff_seconds: float = 0.5,
        max_backoff_seconds: float = 30.0,
        token_env: str | None = None,
        metadata_keys: list[str] | None = None,
        ca_file: str | None = None,
    ) -> None:
        check_positive("timeout_seconds", timeout_seconds)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.concurrency = check_integer("concurrency", concurrency, 1)
        self.deadline_seconds = check_positive("deadline_seconds", deadline_seconds)
        self.retries = check_integer("retries", retries, 0)
        self.backoff_seconds = check_not_negative("backoff_seconds", backoff_seconds)
        self.max_backoff_seconds = check_not_negative("max_backoff_seconds", max_backoff_seconds)
        self.metadata_keys = metadata_keys
        self.client = RewardClient(url, token_env=token_env, timeout_seconds=timeout_seconds, ca_file=ca_file)
        self.gone_since: float | None = None  # time of the first failure after the last score, over all calls
        self._call: ScoringCall | None = None
        self._begin()

    def _begin(self) -> None:
        self.slots = threading.BoundedSemaphore(self.concurrency)  # of which a request takes one
        self._series, self._numbers = uuid.uuid4().hex, itertools.count()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("slots", "_numbers")} | {
            "_call": None
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> Tensor:
        """[B] float64; NaN = the server could not score it, or gave no score in time."""
        return self(prompts, completions, metadata).total

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> RewardScores:
        """The scores, and how often there were retries, timeouts, errors, and completions without a score. Metadata
        that JSON cannot hold are a ValueError, a server that refuses is a RewardServerError."""
        keys = [f"{self._series}-{next(self._numbers)}" for _ in completions]
        rows = zip(keys, prompts, completions, metadata, strict=True)
        items = {key: self._encoded(key, prompt, completion, row) for key, prompt, completion, row in rows}
        call = self._call = ScoringCall(self, items)
        scores = call.run()
        if call.counts["unscored"]:
            self.report_unscored(call.problem, call.counts["unscored"])
        total = torch.tensor([scores.get(key, float("nan")) for key in keys], dtype=torch.float64)
        return RewardScores(total=total, components={self.name: total}, counts={self.name: call.counts})

    def check_metadata(self, row: dict[str, Any]) -> None:
        self._encoded("", "", "", row)

    def close(self) -> None:
        """End a call that another thread waits for."""
        if self._call is not None:
            self._call.stop()

    def __repr__(self) -> str:
        return f"HTTPReward({self.client.where!r})"

    def _encoded(self, key: str, prompt: Prompt, completion: str, row: dict[str, Any]) -> str:
        if self.metadata_keys is not None:
            row = {name: row[name] for name in self.metadata_keys if name in row}
        item = {"id": key, "prompt": prompt, "completion": completion, "metadata": row}
        try:
            return json.dumps(item, allow_nan=False, default=_as_json)
        except (TypeError, ValueError) as error:
            odd = next((column for column, value in row.items() if not _is_json(value)), None)
            raise UserError(
                f"reward {self.name!r} cannot send column {odd!r} of a prompt as JSON ({error}): name the columns that "
                f"it needs in metadata_keys; there are {', '.join(map(repr, row)) or 'none'}."
            ) from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, default=_as_json)
    except (TypeError, ValueError):
        return False
    return True


def _as_json(value: Any) -> str:
    """What JSON has no form of, as people write it: dates in ISO 8601, exact numbers and identifiers in full."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


class ScoringCall:
    """Scores items, given as JSON by their id, in threads. They are daemons: a request that does not end keeps no
    process alive.

    `counts` are of retries, of failures of each kind, and of completions without a score; `problem` is why these were
    given up.
    """

    def __init__(self, reward: HTTPReward, items: Mapping[str, str]) -> None:
        self._reward = reward
        self._items = items
        self._rng = random.Random()  # of its own: the global stream belongs to the training
        self._changed = threading.Condition()
        self._scores: dict[str, float] = {}
        self._error: BaseException | None = None
        self._over = threading.Event()
        keys, size = list(items), reward.batch_size
        self._batches = iter([keys[i : i + size] for i in range(0, len(keys), size)])  # one for all threads
        self._threads_left = min(reward.concurrency, math.ceil(len(keys) / size))
        self._started = time.monotonic()
        self.counts = dict.fromkeys(("retries", "timeouts", "errors", "unscored"), 0)
        self.problem = ""
        self._last_error = ""

    def run(self) -> dict[str, float]:
        """Score by id, without those that could not be had before the deadline."""
        for _ in range(self._threads_left):
            threading.Thread(target=self._work, name="reward requests", daemon=True).start()
        is_told = False
        try:
            with self._changed:
                while self._threads_left and self._error is None and self._goes_on():
                    self._changed.wait(min(_LOOK_SECONDS, max(0.0, self._seconds_left())))
                    gone_since = self._reward.gone_since
                    if not is_told and gone_since is not None and time.monotonic() - gone_since > _LONG_SECONDS:
                        is_told = True
                        message = f"No scores for {_LONG_SECONDS:g} s: {self._last_error}. Asking again."
                        warnings.warn(message, stacklevel=3)
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
        """Until the deadline; a server that is gone is waited for once, not in every call."""
        longest, gone_since = self._reward.deadline_seconds, self._reward.gone_since
        deadline = self._started + longest
        if gone_since is not None:
            deadline = min(deadline, max(gone_since + longest, self._started + _SHARE_IN_OUTAGE * longest))
        return deadline - time.monotonic()

    def _work(self) -> None:
        """Run in each thread: score batches until there are no more."""
        error: BaseException | None = None
        try:
            with self._reward.client.connection() as connection:
                while self._goes_on() and (batch := next(self._batches, None)):
                    self._score(connection, batch)
        except BaseException as raised:  # raised again where the call waits
            error = raised
        with self._changed:
            self._threads_left -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _score(self, connection: httpx.HTTPTransport, batch: Sequence[str]) -> None:
        """Ask for a batch until it is scored; a batch that the server fails at is asked for in halves."""

        def attempt(keys: Sequence[str]) -> Sequence[float] | None:
            """Scores of `keys`, NaN where there is none; None = the server failed at them too often."""
            failures_left = self._reward.retries if len(keys) == len(batch) else _RETRIES_OF_HALVES
            for waits in itertools.count():
                missing = [key for key in keys if key not in self._scores]
                if not missing or not self._goes_on():
                    break
                try:
                    self._ask(connection, missing)
                    break
                except (UnavailableError, FailedAnswerError) as error:
                    self._reward.gone_since = self._reward.gone_since or time.monotonic()
                    self._last_error = str(error)
                    self._count("timeouts" if isinstance(error, RequestTimeoutError) else "errors")
                    failures_left -= isinstance(error, FailedAnswerError)  # only the deadline ends the others
                    # Full jitter: uniform below a limit that doubles with each wait, so that many clients spread out.
                    longest = self._reward.backoff_seconds * 2.0 ** min(waits, 60)
                    delay = error.retry_after + self._rng.uniform(0.0, min(self._reward.max_backoff_seconds, longest))
                if failures_left < 0 or delay >= self._seconds_left() or self._over.wait(delay):
                    self.problem = self._last_error
                    return None
                self._count("retries")
            return [self._scores.get(key, math.nan) for key in keys]

        bisect_failures(batch, attempt, self._goes_on)

    def _ask(self, connection: httpx.HTTPTransport, keys: Sequence[str]) -> None:
        """One request; keeps what it scored."""
        if not self._reward.slots.acquire(timeout=max(0.0, self._seconds_left())):
            raise UnavailableError("earlier requests still wait for their answers")
        try:
            body = f'{{"items": [{", ".join(self._items[key] for key in keys)}]}}'.encode()
            digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
            content = self._reward.client.post(connection, body, {"Idempotency-Key": digest})
        finally:
            self._reward.slots.release()
        scores = scores_by_id(content, keys)
        if scores:
            self._reward.gone_since = None
        with self._changed:
            self._scores |= scores
        if len(scores) < len(keys):
            raise FailedAnswerError("the server left completions out")

    def _count(self, kind: str) -> None:
        with self._changed:
            self.counts[kind] += 1
