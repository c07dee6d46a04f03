"""Base class of health checks: sees metrics that are equal on all ranks, so that ranks agree, and counts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tealightning.functional.reward_ties import TieCause
from tealightning.nonfinite import SkippedStep

ENTROPY = "train/entropy"
MISMATCH = "rollout/log_prob_abs_diff_mean"
SEEN = (
    "train/trained_tokens",
    "train/grad_norm",
    "train/lr",
    "train/kl",
    ENTROPY,
    MISMATCH,
    "rollout/reward_ties",
    "rollout/zero_variance_groups",
)
"""The metrics that checks read."""

GOOD_STEPS_THAT_END_AN_EPISODE = 10
"""So that a value that moves around its threshold is told once."""


@dataclass(kw_only=True, slots=True)
class StepSeen:
    """One training step, over all ranks."""

    metrics: Mapping[str, float]  # those of `SEEN` that the step has logged
    skipped: SkippedStep | None  # not None: loss or gradient were not finite
    global_step: int  # optimizer steps before it
    weights_version: int  # optimizer steps that the sampling weights had seen
    steps_ahead: int  # optimizer steps by which that may lag behind
    unknown_tokens: int  # sampled ids that the tokenizer has no token for
    tie_cause: TieCause | None  # None: ties, if any, are meant

    @property
    def is_on_policy(self) -> bool:
        return self.weights_version == self.global_step

    @property
    def has_trained(self) -> bool:
        """Whether log-probs were computed: without anything to learn from there are none."""
        return self.skipped is None and self.metrics.get("train/trained_tokens", 0.0) > 0


class HealthCheck(ABC):
    """One thing that may be wrong.

    Args:
        setting: The argument of `HealthChecks` that has its limit.
        limit: Beyond which it is wrong.
        patience: Steps in a row that it is wrong for before it is told, for checks that are patient.
    """

    name: ClassVar[str]

    def __init__(self, setting: str, limit: float, patience: int) -> None:
        self.setting = setting
        self.limit = limit
        self.steps = self.steps_needed(limit, patience)
        self.total = 0  # steps at which it was wrong
        self.in_a_row = 0
        self.good = GOOD_STEPS_THAT_END_AN_EPISODE  # steps since it was wrong
        self.is_reported = False

    def steps_needed(self, limit: float, patience: int) -> int:
        """Steps in a row that it is wrong for before it is told."""
        return 1

    @abstractmethod
    def problem(self, seen: StepSeen) -> str | None:
        """What is wrong at this step: a sentence; None = nothing."""

    def applies(self, seen: StepSeen) -> bool:
        """Whether the step says anything about it; a step that does not neither begins nor ends an episode."""
        return seen.skipped is None

    def look(self, seen: StepSeen) -> str | None:
        """Count, and say what is wrong if an episode begins with this step."""
        if not self.applies(seen):
            return None
        problem = self.problem(seen)
        if problem is None:
            self.in_a_row, self.good = 0, self.good + 1
            self.is_reported = self.is_reported and self.good < GOOD_STEPS_THAT_END_AN_EPISODE
            return None
        self.total, self.in_a_row, self.good = self.total + 1, self.in_a_row + 1, 0
        if self.in_a_row < self.steps or self.is_reported:
            return None
        self.is_reported = True
        return problem if self.steps == 1 else f"{problem} (at {self.in_a_row} steps in a row)"

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
