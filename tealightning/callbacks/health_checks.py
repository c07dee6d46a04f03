"""The table of health checks: what each one looks at, when it is wrong, how patient it is, and its advice."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tealightning.functional.tail_checks import TieCause
from tealightning.types import SkippedStep

ENTROPY = "train/entropy"
MISMATCH = "rollout/log_prob_abs_diff_mean"
TIES = "rollout/reward_ties"
METRICS = (
    "train/trained_tokens",
    "train/grad_norm",
    "train/lr",
    "train/kl",
    ENTROPY,
    MISMATCH,
    TIES,
    "rollout/zero_variance_groups",
)
"""The logged metrics that checks read; beside them there is `unknown_tokens`."""

ROUNDING = 1e-4
"""Nats a token: a mismatch below it is float32's, and multiples of that mean nothing."""

GOOD_STEPS_THAT_END_AN_EPISODE = 10
"""So that a value that moves around its threshold is reported once."""

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

    metrics: Mapping[str, float]  # those of `METRICS` that the step has logged, and `unknown_tokens`
    skipped: SkippedStep | None  # not None: loss or gradient were not finite
    global_step: int  # optimizer steps before it
    weights_version: int  # optimizer steps that the sampling weights had seen
    steps_ahead: int  # optimizer steps by which that may lag behind
    tie_cause: TieCause | None  # None: ties, if any, are meant

    @property
    def is_on_policy(self) -> bool:
        return self.weights_version == self.global_step

    @property
    def has_trained(self) -> bool:
        """Whether log-probs were computed: without anything to learn from there are none."""
        return self.skipped is None and self.value("train/trained_tokens") > 0

    def value(self, metric: str) -> float:
        """The metric, 0 if the step has not logged it. Ties that are meant count as none."""
        return 0.0 if metric == TIES and self.tie_cause is None else self.metrics.get(metric, 0.0)


@dataclass(kw_only=True, slots=True, frozen=True)
class Rule:
    """A row of the table: either `metric`, `is_wrong` and `advice`, or a function `problem`."""

    name: str
    setting: str  # the argument of `HealthChecks` that has the limit
    steps: int | Literal["limit", "patience"] = 1  # in a row that it is wrong for before it is reported
    applies: Callable[[StepSummary], bool] = lambda step: step.skipped is None
    """Whether the step says anything about it; a step that does not neither begins nor ends an episode."""
    metric: str = ""
    is_relative: bool = False  # the limit is a fraction of the metric's first value
    is_wrong: Callable[[float, float], bool] = operator.gt  # of the metric's value and the limit
    advice: str = ""  # formatted with value, limit, first (value) and tie_advice
    problem: "Callable[[HealthCheck, StepSummary], str | None] | None" = None


class HealthCheck:
    """A rule with its limit and its counts.

    Args:
        patience: Steps in a row, for rules that are patient.
    """

    def __init__(self, rule: Rule, limit: float, patience: int) -> None:
        self.rule = rule
        self.limit = limit
        self.steps = int(limit) if rule.steps == "limit" else patience if rule.steps == "patience" else rule.steps
        self.total = 0  # steps at which it was wrong
        self.in_a_row = 0
        self.good = GOOD_STEPS_THAT_END_AN_EPISODE  # steps since it was wrong
        self.is_reported = False
        self.first: dict[str, float] = {}  # values of the first step that later ones are compared with

    def look(self, step: StepSummary) -> str | None:
        """Count, and say what is wrong if an episode begins with this step."""
        if not self.rule.applies(step):
            return None
        problem = self.rule.problem(self, step) if self.rule.problem else self._beyond_limit(step)
        if problem is None:
            self.in_a_row, self.good = 0, self.good + 1
            self.is_reported = self.is_reported and self.good < GOOD_STEPS_THAT_END_AN_EPISODE
            return None
        self.total, self.in_a_row, self.good = self.total + 1, self.in_a_row + 1, 0
        if self.in_a_row < self.steps or self.is_reported:
            return None
        self.is_reported = True
        return problem if self.steps == 1 else f"{problem} (at {self.in_a_row} steps in a row)"

    def _beyond_limit(self, step: StepSummary) -> str | None:
        value, limit = step.value(self.rule.metric), self.limit
        if self.rule.is_relative:
            limit *= self.first.setdefault("first", value)
        if not self.rule.is_wrong(value, limit):
            return None
        advice = TIE_ADVICE[step.tie_cause] if step.tie_cause else ""
        first = self.first.get("first", 0.0)
        share = value / first if first else 0.0
        return self.rule.advice.format(value=value, limit=self.limit, first=first, share=share, tie_advice=advice)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total} | self.first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
        is_known = state.get("first") is not None
        self.first = {key: value for key, value in state.items() if key != "total"} if is_known else {}


# ---------------------------------------------------------------- what a threshold does not say


def _not_finite(check: HealthCheck, step: StepSummary) -> str | None:
    """Loss or gradient is NaN or infinite; the module has skipped the step and warned."""
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
    """Engine and trainer disagree about tokens that the engine has just sampled. For rollouts of older weights, part of
    the difference is what was trained since."""
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
    weights: rounding stays, and what an engine misses adds up.

    A policy of higher entropy has more to disagree about, so the limit grows with the entropy. Rollouts that are meant
    to be a step old differ by that step's update, which goes with the learning rate.
    """
    value = step.value(MISMATCH)
    entropy, lr = step.value(ENTROPY), step.value("train/lr")
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


def _far_or_frozen(check: HealthCheck, step: StepSummary) -> str | None:
    """The policy has left its reference, or the reference goes along with the policy."""
    value = step.metrics["train/kl"]
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


def _on_policy(step: StepSummary) -> bool:
    return step.has_trained and step.is_on_policy


def _off_policy(step: StepSummary) -> bool:
    return step.has_trained and not step.is_on_policy


RULES = (
    Rule(name="nonfinite", setting="max_nonfinite_steps", steps="limit", applies=lambda _: True, problem=_not_finite),
    Rule(name="weights_version", setting="max_version_lag", problem=_old_weights),
    Rule(name="mismatch", setting="max_log_prob_diff", applies=_on_policy, problem=_mismatch),
    Rule(name="drift", setting="max_log_prob_diff", applies=_off_policy, problem=_mismatch),
    Rule(name="stale_weights", setting="max_log_prob_growth", steps=3, applies=_on_policy, problem=_stale),
    Rule(name="stale_ahead", setting="max_log_prob_growth", steps=3, applies=_off_policy, problem=_stale),
    Rule(  # ids of embedding rows beyond the tokenizer's tokens; ids beyond the embedding end the run at once
        name="unknown_tokens",
        setting="max_unknown_tokens",
        metric="unknown_tokens",
        advice="{value:.0f} sampled tokens are ids that the tokenizer has no token for: the model's embedding is "
        "larger than its vocabulary, and the policy samples from the rows in between. Is the tokenizer the model's?",
    ),
    Rule(  # rewards that look continuous are tied, because something has rounded, clipped or squashed them
        name="reward_ties",
        setting="max_reward_ties",
        steps="patience",
        metric=TIES,
        advice="{value:.0%} of the completions have the same reward as a different completion of their prompt "
        "(limit {limit:.0%}): {tie_advice}. The best ones cannot be told apart",
    ),
    Rule(
        name="degenerate",
        setting="max_degenerate_steps",
        steps="limit",
        metric="rollout/zero_variance_groups",
        is_wrong=lambda value, _: value >= 1.0,
        advice="all rewards of a prompt are equal, for every prompt: there is nothing to learn from. The reward is "
        "constant, the prompts are too easy or too hard, or the policy says the same thing every time",
    ),
    Rule(
        name="kl",
        setting="max_kl",
        steps="patience",
        applies=lambda step: step.has_trained and "train/kl" in step.metrics,
        problem=_far_or_frozen,
    ),
    Rule(
        name="entropy",
        setting="min_entropy_share",
        steps="patience",
        applies=lambda step: step.has_trained and ENTROPY in step.metrics,
        metric=ENTROPY,
        is_relative=True,
        is_wrong=operator.lt,
        advice="the policy's entropy is {value:.3g} nats a token, {share:.1%} of the {first:.3g} that it began with "
        "(limit {limit:.1%}): its samples are all but the same, and best-of-n gains nothing. Lower the learning rate, "
        "or hold the policy with model.loss.kl_coef",
    ),
)
"""All checks, in the order in which they are made."""
