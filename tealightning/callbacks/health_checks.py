"""The table of health checks: what each one looks at, when it is wrong, how patient it is, and its advice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tealightning.functional.tail_checks import TieCause
from tealightning.types import SkippedStep

ENTROPY = "train/entropy"
MISMATCH = "rollout/log_prob_abs_diff_mean"
ROUNDING = 1e-4  # nats a token: a mismatch below it is float32's, and multiples of that mean nothing
GOOD_STEPS_THAT_END_AN_EPISODE = 10  # so that a value that moves around its threshold is reported once

TIE_ADVICE: dict[TieCause, str] = {
    "bfloat16": "all scores are bfloat16 numbers. Let the reward score in float32",
    "float16": "all scores are float16 numbers. Let the reward score in float32",
    "float32": "the scores are neighbours in float32, as after a sigmoid. Let the reward give its raw score",
    "ceiling": "the highest score is shared by many, as after a clip. Let the reward give its raw score",
    "grid": "the scores are rounded. Let the reward give all digits",
}


@dataclass(kw_only=True, slots=True)
class StepSummary:
    """One training step, over all ranks; equal on all of them, so that ranks agree."""

    metrics: Mapping[str, Tensor | float]  # what the run has logged (docs/metrics.md), and `unknown_tokens`
    skipped: SkippedStep | None  # not None: loss or gradient were not finite
    global_step: int  # optimizer steps before it
    weights_version: int  # optimizer steps that the sampling weights had seen
    steps_ahead: int  # optimizer steps by which that may lag behind
    tie_cause: TieCause | None  # None: ties, if any, are meant

    def value(self, metric: str) -> float:
        """The metric, 0 if it was not logged."""
        return float(self.metrics.get(metric, 0.0))

    @property
    def is_on_policy(self) -> bool:
        return self.weights_version == self.global_step


# Functions and no lambdas: a run in processes that are spawned pickles its callbacks.
def _was_taken(step: StepSummary) -> bool:
    return step.skipped is None


def _any_step(step: StepSummary) -> bool:
    return True


@dataclass(kw_only=True, slots=True)
class HealthCheck:
    """A row of the table `HEALTH_CHECKS`: a logged metric with its bound and advice, or a function `problem`; and, in
    the copy that `HealthChecks` makes of it for a run, how often it was wrong."""

    metric: str = ""  # what must not be above `limit`
    limit: float = 0.0
    patience: int = 1  # steps in a row that it is wrong for before it is reported
    advice: str = ""  # what to say then, with {value} and {limit}
    problem: "Callable[[HealthCheck, StepSummary], str | None] | None" = None  # what is wrong with a step
    applies: Callable[[StepSummary], bool] = _was_taken
    """Whether a step says anything about it; one that does not neither begins nor ends an episode."""
    limit_from: str = ""  # argument of `HealthChecks` that has the limit
    patience_from: str = ""  # ... and the patience

    total: int = field(default=0, init=False)  # steps at which it was wrong
    in_a_row: int = field(default=0, init=False)
    good: int = field(default=GOOD_STEPS_THAT_END_AN_EPISODE, init=False)  # steps since it was wrong
    is_reported: bool = field(default=False, init=False)
    first: dict[str, float] = field(default_factory=dict, init=False)  # what later steps are compared with

    def look(self, step: StepSummary) -> str | None:
        """Count, and say what is wrong if an episode begins with this step."""
        if not self.applies(step):
            return None
        if self.problem is not None:
            problem = self.problem(self, step)
        else:
            value = step.value(self.metric)
            problem = self.advice.format(value=value, limit=self.limit) if value > self.limit else None
        if problem is None:
            self.in_a_row, self.good = 0, self.good + 1
            self.is_reported = self.is_reported and self.good < GOOD_STEPS_THAT_END_AN_EPISODE
            return None
        self.total, self.in_a_row, self.good = self.total + 1, self.in_a_row + 1, 0
        if self.in_a_row < self.patience or self.is_reported:
            return None
        self.is_reported = True
        return problem if self.patience == 1 else f"{problem} (at {self.in_a_row} steps in a row)"

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total} | self.first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
        self.first = {key: value for key, value in state.items() if key != "total" and value is not None}


# ---------------------------------------------------------------- what a bound does not say


def _not_finite(check: HealthCheck, step: StepSummary) -> str | None:
    if step.skipped is None:
        return None
    return (
        f"loss or gradient is NaN or infinite and nothing is trained: {step.skipped}. Look at the saved batches "
        "with their advantages, and at the learning rate"
    )


def _old_weights(check: HealthCheck, step: StepSummary) -> str | None:
    """By the trainer's own books the engine was not given the weights that it should sample from."""
    behind = step.global_step - step.weights_version
    if 0 <= behind <= step.steps_ahead + check.limit:
        return None
    return (
        f"rollouts were sampled from the weights of optimizer step {step.weights_version} and trained on after "
        f"step {step.global_step}: {behind} steps between them, where rollout.steps_ahead makes {step.steps_ahead}"
    )


def _mismatch(check: HealthCheck, step: StepSummary) -> str | None:
    """Engine and trainer disagree about sampled tokens. In part that is what was trained since, for older rollouts."""
    value = step.value(MISMATCH)
    if value <= check.limit:
        return None
    problem = (
        f"log-probs of the sampled tokens differ by {value:.3g} nats a token between engine and trainer "
        f"({MISMATCH}, limit {check.limit:g}): the engine has other weights than the trainer, samples from another "
        "distribution than it says (temperature, top-p, top-k), or computes in too low a precision"
    )
    if step.is_on_policy:
        return problem
    return f"{problem}; or the policy moves that far in {step.global_step - step.weights_version} steps"


def _stale(check: HealthCheck, step: StepSummary) -> str | None:
    """The mismatch has grown to a multiple of what it was at the first step, when the engine surely had the trainer's
    weights: rounding stays, and what an engine misses adds up. The limit grows with the entropy (there is more to
    disagree about) and, for rollouts that are meant to be a step old, with the learning rate of that step."""
    value, entropy, lr = step.value(MISMATCH), step.value(ENTROPY), step.value("train/lr")
    if not check.first:
        # An update too small to be seen, as at the start of a warm-up, is nothing to compare with.
        if step.is_on_policy or value > ROUNDING:
            check.first = {"first": value, "first_entropy": entropy, "first_lr": lr}
        return None
    usual = max(check.first["first"], ROUNDING) * max(1.0, entropy / max(check.first["first_entropy"], 1e-6))
    if not step.is_on_policy:
        usual *= max(1.0, lr / max(check.first["first_lr"], 1e-12))
    if value <= check.limit * usual:
        return None
    return (
        f"log-probs of the sampled tokens differ by {value:.3g} nats a token between engine and trainer, "
        f"{value / usual:.0f} times what they did at the first step (limit {check.limit:g}): the engine does not "
        "have the trainer's weights. Does its sync_weights take over every tensor, each time?"
    )


def _tied_rewards(check: HealthCheck, step: StepSummary) -> str | None:
    """Rewards that look continuous are tied, because something has rounded, clipped or squashed them."""
    ties = step.value("rollout/reward_ties")
    if step.tie_cause is None or ties <= check.limit:
        return None
    return (
        f"{ties:.0%} of the completions have the same reward as a different completion of their prompt (limit "
        f"{check.limit:.0%}): {TIE_ADVICE[step.tie_cause]}. The best ones cannot be told apart"
    )


def _nothing_to_learn(check: HealthCheck, step: StepSummary) -> str | None:
    if step.value("rollout/zero_variance_groups") < 1.0:
        return None
    return (
        "all rewards of a prompt are equal, for every prompt: there is nothing to learn from. The reward is constant, "
        "the prompts are too easy or too hard, or the policy says the same thing every time"
    )


def _far_or_frozen(check: HealthCheck, step: StepSummary) -> str | None:
    """The policy has left its reference, or the reference goes along with the policy."""
    value = step.value("train/kl")
    if "train/kl" not in step.metrics:
        return None  # there is no reference
    if value > check.limit:
        return (
            f"the KL to the reference is {value:.3g} nats a token (train/kl, limit {check.limit:g}): the policy has "
            "left the language that it was loaded with. Lower the learning rate or raise model.loss.kl_coef"
        )
    if step.global_step > 0 and value == 0.0 and step.value("train/grad_norm") > 0:
        return (
            "the KL to the reference is exactly 0 although the policy is trained: the reference is the policy "
            "itself, or the weights do not move (bfloat16 weights swallow small updates: use dtype=float32)"
        )
    return None


def _collapsed(check: HealthCheck, step: StepSummary) -> str | None:
    entropy = step.value(ENTROPY)
    first = check.first.setdefault("first", entropy)
    if not entropy < check.limit * first:
        return None
    return (
        f"the policy's entropy is {entropy:.3g} nats a token, {entropy / first:.1%} of the {first:.3g} that it began "
        f"with (limit {check.limit:.1%}): its samples are all but the same, and best-of-n gains nothing. Lower the "
        "learning rate, or hold the policy with model.loss.kl_coef"
    )


def _trained(step: StepSummary) -> bool:
    """Log-probs were computed: without anything to learn from there are none."""
    return step.skipped is None and step.value("train/trained_tokens") > 0


def _on_policy(step: StepSummary) -> bool:
    return _trained(step) and step.is_on_policy


def _off_policy(step: StepSummary) -> bool:
    return _trained(step) and not step.is_on_policy


HEALTH_CHECKS: dict[str, HealthCheck] = {
    "nonfinite": HealthCheck(problem=_not_finite, patience_from="max_nonfinite_steps", applies=_any_step),
    "weights_version": HealthCheck(problem=_old_weights, limit_from="max_version_lag"),
    "mismatch": HealthCheck(problem=_mismatch, limit_from="max_log_prob_diff", applies=_on_policy),
    "drift": HealthCheck(problem=_mismatch, limit_from="max_log_prob_diff", applies=_off_policy),
    "stale_weights": HealthCheck(problem=_stale, limit_from="max_log_prob_growth", patience=3, applies=_on_policy),
    "stale_ahead": HealthCheck(problem=_stale, limit_from="max_log_prob_growth", patience=3, applies=_off_policy),
    # Ids of embedding rows beyond the tokenizer's tokens; ids beyond the embedding end the run at once.
    "unknown_tokens": HealthCheck(
        metric="unknown_tokens",
        limit_from="max_unknown_tokens",
        advice="{value:.0f} sampled tokens are ids that the tokenizer has no token for: the model's embedding is "
        "larger than its vocabulary, and the policy samples from the rows in between. Is the tokenizer the model's?",
    ),
    "reward_ties": HealthCheck(problem=_tied_rewards, limit_from="max_reward_ties", patience_from="patience"),
    "degenerate": HealthCheck(problem=_nothing_to_learn, patience_from="max_degenerate_steps"),
    "kl": HealthCheck(problem=_far_or_frozen, limit_from="max_kl", patience_from="patience", applies=_trained),
    "entropy": HealthCheck(
        problem=_collapsed, limit_from="min_entropy_share", patience_from="patience", applies=_trained
    ),
}
"""All checks by name, in the order in which they are made. A plug-in adds its own."""
