"""The contract of a reward, and the weighted sum of several."""

import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.registry import Registry, did_you_mean, register, snake_case
from tealightning.rewards.user_function import NoScoresError, message_of, no_numbers, read_scores
from tealightning.types import Prompt, RewardScores

REWARDS = Registry("reward")

Metadata = Sequence[dict[str, Any]]
"""Of each completion: the other columns of its prompt in the data set."""

Row = TypeVar("Row")


class RewardExitError(RuntimeError):
    """A reward's code asked to end the process."""


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

    def check_metadata(self, row: dict[str, Any]) -> None:  # noqa: B027 - optional hook
        """Refuse, with a ValueError, other columns of a prompt that it cannot take: called for every prompt as it is
        read, so that none ends a run hours later."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - optional hook
        """Load what it needs on `device`; called once before the first `score`, safe to call again."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata
    ) -> Tensor | Sequence[float]:
        """One float per completion; the three arguments have the same length B."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> RewardScores:
        """`score` as float64; a ValueError says that it returned another number of values, or what is no number."""
        count = len(completions)  # before the user's code, which may change the list
        values = self.score(prompts, completions, metadata)
        total = as_scores(values, expected=count, source=f"reward {self.name!r}")
        return RewardScores(total=total, components={self.name: total})

    def report_unscored(self, problem: str, unscored: int) -> None:
        """Keep why completions were not scored as `problem`; the first time, warn of it."""
        if self.problem is None:
            warnings.warn(
                f"Reward {self.name!r} has no score for {unscored} completions: {problem}. Later failures are counted, "
                "without this warning.",
                stacklevel=3,
            )
        self.problem = problem

    def close(self) -> None:  # noqa: B027 - optional hook
        """Release what `setup` took; safe to call twice."""


@register
class WeightedReward(Reward):
    """`total = sum_k weights[k] * rewards[k]`, each component logged under its key, unweighted.

    A component with weight 0 is computed and logged only. An unscorable component (NaN) with another weight makes
    the total unscorable.

    Args:
        rewards: Component by name; the names are the keys in metrics and tables.
        weights: One finite number for each of `rewards`; negative ones are penalties.

    Raises:
        ValueError: if the names do not match, a weight is not finite, or all are 0.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        for key, weight in weights.items():
            if key not in rewards:
                raise UserError(f"weights has {key!r}, which is none of the rewards.{did_you_mean(key, rewards)}")
            if not math.isfinite(weight):
                raise UserError(f"weights[{key!r}] must be a finite number, got {weight}.")
        if missing := [key for key in rewards if key not in weights]:
            raise UserError(f"weights lacks {', '.join(missing)}: give every reward one (0 = log it only).")
        if not any(weights.values()):
            raise UserError(f"at least one weight must differ from 0, got weights={weights}.")
        self.rewards = dict(rewards)
        self.weights = dict(weights)

    def check(self) -> None:
        for key, reward in self.rewards.items():
            try:
                reward.check()
            except ValueError as error:
                raise UserError(f"rewards.{key}: {error}") from error

    def check_metadata(self, row: dict[str, Any]) -> None:
        for reward in self.rewards.values():
            reward.check_metadata(row)

    def setup(self, device: torch.device) -> None:
        for reward in self.rewards.values():
            reward.setup(device)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> Tensor:
        """[B] float64 weighted totals."""
        return self(prompts, completions, metadata).total

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> RewardScores:
        """The weighted total and every component unweighted."""
        scores = {key: checked_scores(one, prompts, completions, metadata) for key, one in self.rewards.items()}
        components = {key: one.total for key, one in scores.items()}
        total = torch.zeros(len(completions), dtype=torch.float64)
        for key, weight in self.weights.items():
            if weight != 0:  # 0 * NaN would be NaN
                total += weight * components[key]
        counts = {key: summed_counts(one.counts.values()) for key, one in scores.items() if one.counts}
        return RewardScores(total=total, components=components, counts=counts)

    @property
    def problem(self) -> str | None:  # type: ignore[override]
        problems = [f"{key}: {reward.problem}" for key, reward in self.rewards.items() if reward.problem]
        return "; ".join(problems) or None

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()

    def __repr__(self) -> str:
        return f"WeightedReward({', '.join(f'{w:g} * {key}' for key, w in self.weights.items())})"


def bisect_failures(
    rows: Sequence[Row],
    attempt: Callable[[Sequence[Row]], Sequence[float] | None],
    go_on: Callable[[], bool] = lambda: True,
) -> dict[Row, float]:
    """Scores of `rows`, without those that cannot be scored: all at once, and where that fails, of its halves, down to
    single rows. A single bad row among n costs at most `2 * log2(n)` further attempts.

    Args:
        rows: What to score; hashable and distinct.
        attempt: Returns one score for each of the rows it gets; None = it failed.
        go_on: Asked before every attempt but the first; False = stop here.
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


def summed_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """`parts` added up by their keys."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def checked_scores(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata
) -> RewardScores:
    """What `reward` says, held to its contract whatever its class has overridden: float64 on the CPU, one for each
    completion, and nothing that ends the process. It gets lists of its own, in case it sorts or empties them."""
    name, count = f"reward {getattr(reward, 'name', reward)!r}", len(completions)
    with errors_only(f"{name}, scoring {count} completions,"):
        scores = reward(list(prompts), list(completions), list(metadata))
    if not isinstance(scores, RewardScores):
        raise UserError(f"{name} must return RewardScores when it is called, got {type(scores).__name__}.")
    components = {
        key: as_scores(values, expected=count, source=f"{name}, component {key!r},")
        for key, values in scores.components.items()
    }
    total = as_scores(scores.total, expected=count, source=name)
    return RewardScores(total=total, components=components, counts=scores.counts)


@contextmanager
def errors_only(who: str) -> Iterator[None]:
    """Turn what would end the process without an error, such as `sys.exit(0)`, into one: a run that user code has cut
    short must not look like one that is done."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RewardExitError(f"{who} raised {type(error).__name__}: {message_of(error)}") from error


def as_scores(values: Any, *, expected: int, source: str) -> Tensor:
    """[expected] float64 on the CPU, or a ValueError that says what `source` returned. `None` becomes NaN."""
    try:
        scores, problems = read_scores(values, expected)
    except NoScoresError as error:
        raise UserError(f"{source} {error}") from error.__cause__
    if problems:
        raise UserError(f"{source} {no_numbers(*problems.values())}")
    return torch.tensor(scores, dtype=torch.float64)
