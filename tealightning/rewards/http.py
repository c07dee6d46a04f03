"""Reward computed by an HTTP server."""

import itertools
import json
import threading
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tealightning.checks import check_integer, check_not_negative
from tealightning.errors import UserError
from tealightning.registry import register
from tealightning.rewards.base import Reward, check_seconds
from tealightning.rewards.http_call import OutageClock, RetryPolicy, ScoringCall
from tealightning.rewards.http_client import RewardClient
from tealightning.types import Prompt, RewardScores


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
        for name, value, minimum in (
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            check_integer(name, value, minimum)
        check_not_negative("backoff_seconds", backoff_seconds)
        check_not_negative("max_backoff_seconds", max_backoff_seconds)
        check_seconds("timeout_seconds", timeout_seconds)
        check_seconds("deadline_seconds", deadline_seconds)
        self.metadata_keys = metadata_keys
        self._client = RewardClient(url, token_env=token_env, timeout_seconds=timeout_seconds, ca_file=ca_file)
        self._policy = RetryPolicy(
            batch_size=batch_size,
            concurrency=concurrency,
            deadline_seconds=deadline_seconds,
            retries=retries,
            backoff_seconds=backoff_seconds,
            max_backoff_seconds=max_backoff_seconds,
        )
        self._outage = OutageClock(deadline_seconds)
        self._slots = threading.BoundedSemaphore(concurrency)
        self._series, self._numbers = uuid.uuid4().hex, itertools.count()
        self._call: ScoringCall | None = None

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """[B] float64; NaN = the server could not score it, or gave no score in time."""
        return self(prompts, completions, metadata).total

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """The scores, and how often there were retries, timeouts, errors, and completions without a score.

        Raises:
            ValueError: for metadata that JSON cannot hold.
            RewardServerError: if the server refuses.
        """
        keys = [f"{self._series}-{next(self._numbers)}" for _ in completions]
        rows = zip(keys, prompts, completions, metadata, strict=True)
        items = {key: self._encoded(key, prompt, completion, row) for key, prompt, completion, row in rows}
        call = self._call = ScoringCall(
            self._client, items, policy=self._policy, outage=self._outage, slots=self._slots
        )
        scores = call.run()
        if call.counts["unscored"]:
            self._report(call)
        total = torch.tensor([scores.get(key, float("nan")) for key in keys], dtype=torch.float64)
        return RewardScores(total=total, components={self.name: total}, counts={self.name: call.counts})

    def close(self) -> None:
        """End a call that another thread waits for."""
        if self._call is not None:
            self._call.stop()

    def __repr__(self) -> str:
        return f"HTTPReward({self._client.where!r})"

    def _encoded(self, key: str, prompt: Prompt, completion: str, row: dict[str, Any]) -> str:
        if self.metadata_keys is not None:
            row = {name: row[name] for name in self.metadata_keys if name in row}
        item = {"id": key, "prompt": prompt, "completion": completion, "metadata": row}
        try:
            return json.dumps(item, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward {self.name!r} cannot send the metadata of a prompt as JSON ({error}): name the columns that "
                f"it needs in metadata_keys; there are {', '.join(map(repr, row)) or 'none'}."
            ) from error

    def _report(self, call: ScoringCall) -> None:
        if self.problem is None:
            warnings.warn(
                f"Reward {self.name!r} has no score for {call.counts['unscored']} completions: {call.problem}. Later "
                "ones are counted, without this warning.",
                stacklevel=3,
            )
        self.problem = call.problem
