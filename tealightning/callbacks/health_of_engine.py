"""Health checks of the engine: has it the trainer's weights, and does it sample what it says?"""

import math
from collections.abc import Mapping
from typing import Any

from tealightning.callbacks.health_check import ENTROPY, MISMATCH, HealthCheck, StepSeen

ROUNDING = 1e-4
"""Nats a token: a mismatch below it is float32's, and multiples of that mean nothing."""


class WeightsVersion(HealthCheck):
    """By the trainer's own books the engine was not given the weights that it should sample from."""

    name = "weights_version"

    def problem(self, seen: StepSeen) -> str | None:
        behind = seen.global_step - seen.weights_version
        if 0 <= behind <= seen.steps_ahead + self.limit:
            return None
        return (
            f"rollouts were sampled from the weights of optimizer step {seen.weights_version} and trained on after "
            f"step {seen.global_step}: {behind} steps between them, where rollout.steps_ahead makes {seen.steps_ahead}"
        )


class Mismatch(HealthCheck):
    """Engine and trainer disagree about tokens that the engine has just sampled."""

    name = "mismatch"

    def applies(self, seen: StepSeen) -> bool:
        return seen.has_trained and seen.is_on_policy

    def problem(self, seen: StepSeen) -> str | None:
        value = seen.metrics.get(MISMATCH, 0.0)
        if value <= self.limit:
            return None
        return (
            f"log-probs of the sampled tokens differ by {value:.3g} nats a token between engine and trainer "
            f"({MISMATCH}, limit {self.limit:g}): the engine has other weights than the trainer, samples from another "
            "distribution than it says (temperature, top-p, top-k), or computes in too low a precision"
        )


class Drift(Mismatch):
    """The same for rollouts of older weights, where part of the difference is what was trained since."""

    name = "drift"

    def applies(self, seen: StepSeen) -> bool:
        return seen.has_trained and not seen.is_on_policy

    def problem(self, seen: StepSeen) -> str | None:
        problem = super().problem(seen)
        return problem and f"{problem}; or the policy moves that far in {seen.global_step - seen.weights_version} steps"


class StaleWeights(HealthCheck):
    """The mismatch has grown to a multiple of what it was at the first step, when the engine surely had the trainer's
    weights: rounding stays, and what an engine misses adds up.

    A policy of higher entropy has more to disagree about, so the limit grows with the entropy.
    """

    name = "stale_weights"

    def __init__(self, setting: str, limit: float, patience: int) -> None:
        super().__init__(setting, limit, patience)
        self.first: float | None = None
        self.first_entropy = math.nan

    def steps_needed(self, limit: float, patience: int) -> int:
        return 3

    def applies(self, seen: StepSeen) -> bool:
        return seen.has_trained and seen.is_on_policy

    def usual(self, seen: StepSeen) -> float | None:
        """What the mismatch may be at this step, given what it was at the first one; None at the first one."""
        entropy = seen.metrics.get(ENTROPY, 0.0)
        if self.first is None:
            self.first, self.first_entropy = seen.metrics.get(MISMATCH, 0.0), entropy
            return None
        return max(self.first, ROUNDING) * max(1.0, entropy / max(self.first_entropy, 1e-6))

    def problem(self, seen: StepSeen) -> str | None:
        value, usual = seen.metrics.get(MISMATCH, 0.0), self.usual(seen)
        if usual is None or value <= self.limit * usual:
            return None
        return (
            f"log-probs of the sampled tokens differ by {value:.3g} nats a token between engine and trainer, "
            f"{value / usual:.0f} times what they did at the first step (limit {self.limit:g}): the engine does not "
            "have the trainer's weights. Does its sync_weights take over every tensor, each time?"
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first": self.first, "first_entropy": self.first_entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.first, self.first_entropy = state["first"], state["first_entropy"]


class StaleAhead(StaleWeights):
    """The same for rollouts that are meant to be a step old: that step's update makes a difference that goes with the
    learning rate, and what an engine misses adds up."""

    name = "stale_ahead"

    def __init__(self, setting: str, limit: float, patience: int) -> None:
        super().__init__(setting, limit, patience)
        self.first_lr = math.nan

    def applies(self, seen: StepSeen) -> bool:
        # An update too small to be seen, as at the start of a warm-up, is nothing to compare with.
        is_seen = self.first is not None or seen.metrics.get(MISMATCH, 0.0) > ROUNDING
        return seen.has_trained and not seen.is_on_policy and is_seen

    def usual(self, seen: StepSeen) -> float | None:
        lr = seen.metrics.get("train/lr", 0.0)
        if self.first is None:
            self.first_lr = lr
        usual = super().usual(seen)
        return usual and usual * max(1.0, lr / max(self.first_lr, 1e-12))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first_lr": self.first_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.first_lr = state["first_lr"]


class UnknownTokens(HealthCheck):
    """Sampled ids of embedding rows beyond the tokenizer's tokens. (Ids beyond the embedding end the run at once.)"""

    name = "unknown_tokens"

    def problem(self, seen: StepSeen) -> str | None:
        if seen.unknown_tokens <= self.limit:
            return None
        return (
            f"{seen.unknown_tokens} sampled tokens are ids that the tokenizer has no token for: the model's embedding "
            "is larger than its vocabulary, and the policy samples from the rows in between. Is the tokenizer the "
            "model's?"
        )
