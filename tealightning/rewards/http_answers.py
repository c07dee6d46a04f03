"""Parse a reward server's answer: scores by id, or why it cannot be used."""

import json
import math
from collections.abc import Collection
from typing import Any


class BadAnswerError(ValueError):
    """The answer is not what was asked for, and nothing of it is used."""


def scores_by_id(body: bytes, asked: Collection[str]) -> dict[str, float]:
    """The scores in `{"scores": [{"id": ..., "score": ...}, ...]}`, whatever their order.

    `null`, NaN and infinities are NaN: the server says that it cannot score this completion. A score that is no number
    is left out, as if its id were missing.

    Args:
        body: Of the answer.
        asked: The ids that the answer may name.

    Raises:
        BadAnswerError: for something else than such JSON, an id that was not asked for, or one that comes twice: then
            the server mixes requests up, and its other scores cannot be trusted either.
    """
    scores: dict[str, float] = {}
    seen: set[str] = set()
    for entry in _entries(body):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or "score" not in entry:
            raise BadAnswerError('an entry of "scores" is not {"id": string, "score": number or null}')
        key = entry["id"]
        if key not in asked:
            raise BadAnswerError("it scored an id that was not asked for")
        if key in seen:
            raise BadAnswerError("it scored an id twice")
        seen.add(key)
        score = _number(entry["score"])
        if score is not None:
            scores[key] = score
    return scores


def _entries(body: bytes) -> list[Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:  # a ValueError is also text that is not UTF-8
        raise BadAnswerError(f"it is no JSON ({type(error).__name__})") from error
    entries = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise BadAnswerError('it has no list "scores"')
    return entries


def _number(value: Any) -> float | None:
    """NaN for "cannot be scored"; None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else math.nan
