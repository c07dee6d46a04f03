"""Bisect a batch that fails, so that one completion that cannot be scored does not cost the others."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def scores_by_halves(
    rows: Sequence[Row],
    attempt: Callable[[Sequence[Row]], Sequence[float] | None],
    go_on: Callable[[], bool] = lambda: True,
) -> dict[Row, float]:
    """Scores of `rows`: all at once, and where that fails, of its halves, down to single rows.

    A single bad row among n costs at most `2 * log2(n)` further attempts, and nothing fails more than `2n - 1` times.

    Args:
        rows: What to score; hashable and distinct.
        attempt: One score for each of the rows it gets, or None = it failed.
        go_on: Asked before every attempt but the first.

    Returns:
        Score by row, without the rows that could not be scored.
    """
    scores: dict[Row, float] = {}
    parts: list[Sequence[Row]] = [rows]
    first = True
    while parts and (first or go_on()):
        part, first = parts.pop(), False
        values = attempt(part)
        if values is not None:
            scores.update(zip(part, values, strict=True))
        elif len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
    return scores
