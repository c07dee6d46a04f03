"""The contract of a reward."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.registry import Registry, snake_case
from tealightning.types import Prompt, RewardScores

REWARDS = Registry("reward")

Row = TypeVar("Row")


class Reward(ABC):
    """Scores completions. NaN means "could not be scored"; never 0 for that, no clipping, no squashing: they destroy
    the upper tail that the estimators extrapolate."""

    registry: ClassVar[Registry] = REWARDS
    problem: str | None = None
    """Why it last could not score something, for messages; None = nothing happened."""

    @property
    def name(self) -> str:
        """Its key in metrics and tables."""
        return snake_case(type(self).__name__).removesuffix("_reward")

    def check(self) -> None:  # noqa: B027 - optional hook
        """Refuse, with a ValueError, what cannot work: called at the start of a run, before anything is loaded."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - optional hook
        """Load what it needs on `device`; called once before the first `score`, safe to call again."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor | Sequence[float]:
        """One float per completion; the three arguments have the same length B."""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """`score`, checked: B values, as float64.

        Raises:
            ValueError: if `score` returned another number of values or something that is no number.
        """
        values = self.score(prompts, completions, metadata)
        total = as_scores(values, expected=len(completions), source=f"reward {self.name!r}")
        return RewardScores(total=total, components={self.name: total})

    def close(self) -> None:  # noqa: B027 - optional hook
        """Release what `setup` took; safe to call twice."""


def bisect_failures(
    rows: Sequence[Row],
    attempt: Callable[[Sequence[Row]], Sequence[float] | None],
    go_on: Callable[[], bool] = lambda: True,
) -> dict[Row, float]:
    """Scores of `rows`: all at once, and where that fails, of its halves, down to single rows.

    A single bad row among n costs at most `2 * log2(n)` further attempts, and nothing fails more than `2n - 1` times.

    Args:
        rows: What to score; hashable and distinct.
        attempt: Returns one score for each of the rows it gets; None = it failed.
        go_on: Asked before every attempt but the first; False = stop here.

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


def check_seconds(name: str, seconds: float) -> None:
    """Refuse, with a UserError, `seconds` that are not above 0 or longer than a thread can wait."""
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"{name} must be above 0, got {seconds}.")


def summed_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """`parts` added up by their keys."""
    total: dict[str, int] = {}
    for part in parts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total


def as_scores(values: Any, *, expected: int, source: str) -> Tensor:
    """[expected] float64 on the CPU, or a ValueError that says what `source` returned. `None` becomes NaN."""
    try:
        if not isinstance(values, Tensor):
            values = torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source} must return one number per completion (None or NaN = unscorable): {error}"
        ) from error
    if values.shape != (expected,):
        raise UserError(f"{source} must return {expected} values, one per completion, got shape {tuple(values.shape)}.")
    return values.detach().to("cpu", torch.float64)
