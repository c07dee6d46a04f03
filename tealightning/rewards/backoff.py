"""Waiting times between retries."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def full_jitter(attempt: int, *, first_seconds: float, most_seconds: float, rng: random.Random) -> float:
    """Uniform on `[0, min(most_seconds, first_seconds * 2**attempt)]`, so that many clients spread out.

    Args:
        attempt: Failures so far, minus 1.
        first_seconds: Longest wait after the first failure.
        most_seconds: Longest wait of all.
        rng: Its own stream: the global ones belong to the training.
    """
    return rng.uniform(0.0, min(most_seconds, first_seconds * 2.0 ** min(attempt, 60)))


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float:
    """What a `Retry-After` header asks for, in seconds or as a date; 0 for none and for what is neither."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return min(float(header), 1e9)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    until = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())
