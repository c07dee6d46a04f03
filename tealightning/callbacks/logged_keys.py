"""Keys that a training run logs, for what waits for one of them (`monitor`): the list of docs/metrics.md."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from tealightning.callbacks.budget import Budget
from tealightning.callbacks.health import HealthChecks
from tealightning.callbacks.rollout import RolloutCallback
from tealightning.rewards.base import Reward, WeightedReward

COMPLETIONS = (
    *("reward_mean", "reward_std", "reward_max", "completion_length_mean", "completion_length_max"),
    *("truncated_fraction", "unscorable_fraction", "zero_variance_groups", "reward_ties"),
)
"""Of every batch of rollouts: `rollout/` in training, `val/` in validation."""
UPDATE = (
    *("policy_loss", "clip_fraction", "entropy", "grad_norm", "nonfinite_steps", "lr", "advantage_std"),
    *("trained_tokens", "rollouts_skipped", "groups_too_small"),
)
ROLLOUT = (
    *("step", "generate_seconds", "reward_seconds", "sync_seconds"),
    *("log_prob_abs_diff_mean", "log_prob_abs_diff_max"),
)
BUDGET = ("total_rollouts", "total_generated_tokens", "total_trained_tokens")
LINE = ("tail_qq_r2", "tail_qq_rejected", "tail_shape", "tail_shape_se", "tail_shape_gaussian")  # 7 samples or more
PREDICTION = (*(f"tail_prediction_error{end}" for end in ("", "_se", "_gaussian")), "tail_coverage")  # 32
FAILURES = ("unscored", "errors", "timeouts", "crashes", "retries")
"""Of rewards that count their failures."""

_BETTER_IF_LARGER = re.compile(
    r"reward|(val|rollout)/reward_(mean|max)|(val|rollout)/reward_.+_mean|val/best_of_\d+(_extrapolated)?"
)


def training_keys(module: Any, rollout: RolloutCallback, callbacks: Iterable[Callback] = ()) -> set[str]:
    """What each training step logs."""
    keys = {f"train/{name}" for name in UPDATE} | {"reward"}
    keys |= {f"rollout/{name}" for name in (*ROLLOUT, *COMPLETIONS, *_components(rollout.reward))}
    if module.with_reference:
        keys.add("train/kl")
    if module.loss.importance_cap is not None:
        keys.add("train/importance_clip_fraction")
    if rollout.steps_ahead:
        keys |= {"rollout/wait_seconds", "rollout/staleness"}
    for callback in callbacks:
        if isinstance(callback, Budget):
            keys |= {f"train/{name}" for name in BUDGET}
        if isinstance(callback, HealthChecks):
            keys |= {f"train/health_{name}" for name in callback.counts}
    return keys


def validation_keys(module: Any, rollout: RolloutCallback) -> set[str]:
    """What each validation logs, if every prompt has as many scored samples as `max(ns)`."""
    most, extrapolated = max(module.ns), module.best_of_n["val"].extrapolate_ns
    names = [*COMPLETIONS, *_components(rollout.reward), "tail_ties"]
    names += [f"best_of_{n}{end}" for n in module.ns for end in ("", "_se")]
    names += [f"best_of_{n}_extrapolated{end}" for n in extrapolated for end in ("", "_se")]
    names += [*(LINE if most >= 7 else ()), *(PREDICTION if most >= 32 else ())]
    return {f"val/{name}" for name in names}


def sometimes_logged(key: str) -> bool:
    """Whether a run may log the key, although not each: counts of failures, and of samples that are missing."""
    failures = "|".join(FAILURES)
    return re.fullmatch(rf"(rollout|val)/reward_.+_({failures})|val/best_of_\d+_prompts", key) is not None


def is_better_if_larger(key: str) -> bool:
    """Whether a larger value of the metric is surely the better one: rewards, and the best of n."""
    return _BETTER_IF_LARGER.fullmatch(key) is not None


def other_loggers(module: Any, callbacks: Iterable[Callback], own: type) -> list[str]:
    """Classes of the run that may log keys of their own: subclasses of `own`, the module, and foreign callbacks."""
    classes = [type(callback) for callback in callbacks] + ([] if type(module) is own else [type(module)])
    ours = ("tealightning.", "lightning.", "pytorch_lightning.")
    foreign = [cls for cls in classes if not f"{cls.__module__}.".startswith(ours)]
    return [cls.__name__ for cls in (*foreign, *(cls for cls in classes if issubclass(cls, LearningRateMonitor)))]


def _components(reward: Reward) -> list[str]:
    names = list(reward.rewards) if isinstance(reward, WeightedReward) else [reward.name]
    return [f"reward_{name}_mean" for name in names]
