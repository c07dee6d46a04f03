"""Health checks of learning, and the base class of all: metrics equal on all ranks, so that ranks agree."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tealightning.functional.tail_checks import TieCause
from tealightning.training.nonfinite import SkippedStep

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


CAUSES: dict[TieCause, str] = {
    "bfloat16": "all scores are bfloat16 numbers. Let the reward score in float32",
    "float16": "all scores are float16 numbers. Let the reward score in float32",
    "float32": "the scores are neighbours in float32, as after a sigmoid. Let the reward give its raw score",
    "ceiling": "the highest score is shared by many, as after a clip. Let the reward give its raw score",
    "grid": "the scores are rounded. Let the reward give all digits",
}


class NonFinite(HealthCheck):
    """Loss or gradient is NaN or infinite; the module has skipped the step and warned."""

    name = "nonfinite"

    def steps_needed(self, limit: float, patience: int) -> int:
        return int(limit)

    def applies(self, seen: StepSeen) -> bool:
        return True

    def problem(self, seen: StepSeen) -> str | None:
        if seen.skipped is None:
            return None
        return (
            f"loss or gradient is NaN or infinite and nothing is trained: {seen.skipped}. Look at the saved batches "
            "with their advantages, and at the learning rate"
        )


class RewardPrecision(HealthCheck):
    """Rewards that look continuous are tied, because something has rounded, clipped or squashed them."""

    name = "reward_ties"

    def steps_needed(self, limit: float, patience: int) -> int:
        return patience

    def problem(self, seen: StepSeen) -> str | None:
        share = seen.metrics.get("rollout/reward_ties", 0.0)
        if seen.tie_cause is None or not share > self.limit:
            return None
        return (
            f"{share:.0%} of the completions have the same reward as a different completion of their prompt "
            f"(limit {self.limit:.0%}): {CAUSES[seen.tie_cause]}. The best ones cannot be told apart"
        )


class Degenerate(HealthCheck):
    """No group has two different rewards: there is nothing to learn from."""

    name = "degenerate"

    def steps_needed(self, limit: float, patience: int) -> int:
        return int(limit)

    def problem(self, seen: StepSeen) -> str | None:
        if seen.metrics.get("rollout/zero_variance_groups", 0.0) < 1.0:
            return None
        return (
            "all rewards of a prompt are equal, for every prompt: there is nothing to learn from. The reward is "
            "constant, the prompts are too easy or too hard, or the policy says the same thing every time"
        )


class KL(HealthCheck):
    """The policy has left its reference, or the reference goes along with the policy."""

    name = "kl"

    def steps_needed(self, limit: float, patience: int) -> int:
        return patience

    def applies(self, seen: StepSeen) -> bool:
        return seen.has_trained and "train/kl" in seen.metrics

    def problem(self, seen: StepSeen) -> str | None:
        value = seen.metrics["train/kl"]
        if value > self.limit:
            return (
                f"the KL to the reference is {value:.3g} nats a token (train/kl, limit {self.limit:g}): the policy has "
                "left the language that it was loaded with. Lower the learning rate or raise model.loss.kl_coef"
            )
        if seen.global_step > 0 and value == 0.0 and seen.metrics.get("train/grad_norm", 0.0) > 0:
            return (
                "the KL to the reference is exactly 0 although the policy is trained: the reference is the policy "
                "itself, or the weights do not move (bfloat16 weights swallow small updates: use dtype=float32)"
            )
        return None


class Entropy(HealthCheck):
    """The policy has become all but deterministic."""

    name = "entropy"

    def __init__(self, setting: str, limit: float, patience: int) -> None:
        super().__init__(setting, limit, patience)
        self.first: float | None = None

    def steps_needed(self, limit: float, patience: int) -> int:
        return patience

    def applies(self, seen: StepSeen) -> bool:
        return seen.has_trained and ENTROPY in seen.metrics

    def problem(self, seen: StepSeen) -> str | None:
        value = seen.metrics[ENTROPY]
        if self.first is None:
            self.first = value
        if value >= self.limit * self.first:
            return None
        return (
            f"the policy's entropy is {value:.3g} nats a token, {value / self.first:.1%} of the {self.first:.3g} that "
            f"it began with (limit {self.limit:.1%}): its samples are all but the same, and best-of-n gains nothing. "
            "Lower the learning rate, or hold the policy with model.loss.kl_coef"
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.first = state["first"]
