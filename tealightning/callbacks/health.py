"""Health checks: watch a training run for what is wrong without an error, and warn or stop it."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save

from tealightning.callbacks.health_checks import METRICS, RULES, HealthCheck, Rule, StepSummary
from tealightning.callbacks.rollout import RolloutCallback
from tealightning.errors import UserError
from tealightning.functional.tail_checks import TIE_CAUSES, tie_cause, tied
from tealightning.registry import did_you_mean
from tealightning.reliability.files import run_folder, write_whole
from tealightning.training.nonfinite import UnhealthyRun
from tealightning.types import PromptBatch, RolloutBatch, SkippedStep

CHECKS = tuple(rule.name for rule in RULES)
"""Names of all checks."""

_AT_LEAST_ONE = ("max_nonfinite_steps", "max_degenerate_steps", "max_log_prob_growth", "patience")


class HealthChecks(Callback):
    """Looks at what every training step has logged. A check that fails is counted (`train/health_{check}`) and warned
    about once an episode, or, for the checks in `stop_on`, ends the run with an `UnhealthyRun` on all ranks.

    It changes nothing: a run in which nothing is wrong is the same to the last digit. null switches a check off.

    Args:
        stop_on: Checks that end the run; the others warn. Of nonfinite, weights_version, mismatch, drift,
            stale_weights, stale_ahead, unknown_tokens, reward_ties, degenerate, kl, entropy.
        max_nonfinite_steps: `nonfinite`: steps in a row whose loss or gradient is NaN or infinite. (None of them is
            taken.)
        max_saved_batches: Batches of such steps that are saved, in `unhealthy/` of the run's folder.
        max_log_prob_diff: `mismatch`: mean difference between the engine's and the trainer's log-prob of the sampled
            tokens, in nats. `drift`: the same for rollouts of older weights (rollout.steps_ahead).
        max_log_prob_growth: `stale_weights`: how many times that difference may be what it was at the first step.
            `stale_ahead`: the same for rollouts of older weights.
        max_version_lag: `weights_version`: optimizer steps by which the weights that sampled may be older than
            rollout.steps_ahead makes them, by the trainer's own books.
        max_unknown_tokens: `unknown_tokens`: of a step, sampled ids that the tokenizer has no token for.
        max_reward_ties: `reward_ties`: fraction of completions whose reward equals that of a different completion of
            the same prompt, where rewards look rounded, clipped or squashed.
        max_degenerate_steps: `degenerate`: steps in a row at which no group has two different rewards.
        max_kl: `kl`: to the reference, in nats per token; also exactly 0 while the policy trains.
        min_entropy_share: `entropy`: as a fraction of what it was at the first step.
        patience: Steps in a row that `reward_ties`, `kl` and `entropy` take to fail.
    """

    def __init__(
        self,
        *,
        stop_on: Sequence[str] = ("nonfinite", "weights_version", "mismatch", "stale_weights"),
        max_nonfinite_steps: int | None = 5,
        max_saved_batches: int = 3,
        max_log_prob_diff: float | None = 0.2,
        max_log_prob_growth: float | None = 5.0,
        max_version_lag: int | None = 0,
        max_unknown_tokens: int | None = 0,
        max_reward_ties: float | None = 0.2,
        max_degenerate_steps: int | None = 20,
        max_kl: float | None = 1.0,
        min_entropy_share: float | None = 0.05,
        patience: int = 10,
    ) -> None:
        for check in stop_on:
            if check not in CHECKS:
                raise UserError(f"health.stop_on: there is no check {check!r}.{did_you_mean(check, CHECKS)}")
        limits: dict[str, float | None] = {
            "max_nonfinite_steps": max_nonfinite_steps,
            "max_version_lag": max_version_lag,
            "max_log_prob_diff": max_log_prob_diff,
            "max_log_prob_growth": max_log_prob_growth,
            "max_unknown_tokens": max_unknown_tokens,
            "max_reward_ties": max_reward_ties,
            "max_degenerate_steps": max_degenerate_steps,
            "max_kl": max_kl,
            "min_entropy_share": min_entropy_share,
        }
        for name, limit in (limits | {"patience": patience, "max_saved_batches": max_saved_batches}).items():
            lowest = 1 if name in _AT_LEAST_ONE else 0
            if limit is not None and not limit >= lowest:
                raise UserError(f"health.{name} must be at least {lowest}, or null for no check, got {limit}.")
        self.stop_on = tuple(stop_on)
        self.max_saved_batches = max_saved_batches
        self.saved_batches = 0
        self._checks = [
            HealthCheck(rule, limit, patience) for rule in RULES if (limit := limits[rule.setting]) is not None
        ]
        self._global_step = 0  # before the step under way

    @property
    def counts(self) -> dict[str, int]:
        """Steps at which each check that is on has failed so far."""
        return {check.rule.name: check.total for check in self._checks}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        self._global_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        step = self._summary(trainer, pl_module, batch)
        if step.skipped is not None and self.saved_batches < self.max_saved_batches:
            self.saved_batches += 1
            where = {"step": trainer.fit_loop.total_batch_idx, "rank": trainer.global_rank}
            save_unhealthy_batch(run_folder(trainer) / "unhealthy", batch, step.skipped, **where)
        problems = {check: check.look(step) for check in self._checks}
        for check in self._checks:
            pl_module.log(f"train/health_{check.rule.name}", float(check.total))
        for check, problem in problems.items():
            if problem is not None:
                self._report(check.rule, problem)

    def state_dict(self) -> dict[str, Any]:
        checks = {check.rule.name: check.state_dict() for check in self._checks}
        return {"checks": checks, "saved_batches": self.saved_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved_batches = state_dict["saved_batches"]
        for check in self._checks:
            if check.rule.name in state_dict["checks"]:
                check.load_state_dict(state_dict["checks"][check.rule.name])

    def _summary(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch) -> StepSummary:
        rollouts = batch.rollouts
        assert rollouts is not None, "a step that has ended had rollouts"
        metrics = {key: float(trainer.callback_metrics[key]) for key in METRICS if key in trainer.callback_metrics}
        sampler = next((c for c in trainer.callbacks if isinstance(c, RolloutCallback)), None)  # type: ignore[attr-defined]
        observed = torch.tensor([self._unknown_tokens(pl_module, rollouts), self._tie_cause(rollouts)])
        unknown, cause = trainer.strategy.reduce(observed.to(pl_module.device), reduce_op="max").tolist()
        return StepSummary(
            metrics=metrics | {"unknown_tokens": unknown},
            skipped=pl_module.skipped.last,
            global_step=self._global_step,
            weights_version=rollouts.weights_version if sampler else self._global_step,
            steps_ahead=sampler.steps_ahead * pl_module.inner_epochs if sampler else 0,
            tie_cause=TIE_CAUSES[cause - 1] if cause else None,
        )

    def _unknown_tokens(self, pl_module: Any, rollouts: RolloutBatch) -> int:
        if "unknown_tokens" not in self.counts:
            return 0
        unknown = (rollouts.completion_ids >= len(pl_module.tokenizer)) & rollouts.completion_mask
        return int(unknown.sum())

    def _tie_cause(self, rollouts: RolloutBatch) -> int:
        """0, or 1 + the place of the cause in `TIE_CAUSES`: what ranks can exchange."""
        if "reward_ties" not in self.counts:
            return 0
        rewards = rollouts.rewards.cpu()
        cause = tie_cause(rewards, tied(rewards, rollouts.completions))
        return 0 if cause is None else 1 + TIE_CAUSES.index(cause)

    def _report(self, rule: Rule, problem: str) -> None:
        text = f"{problem}. (Health check {rule.name}; health.{rule.setting}=null switches it off.)"
        if rule.name in self.stop_on:
            raise UnhealthyRun(f"Training was stopped after optimizer step {self._global_step}: {text}")
        _warn(f"After optimizer step {self._global_step}: {text}")


@rank_zero_only
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def save_unhealthy_batch(folder: Path, batch: PromptBatch, skipped: SkippedStep, *, step: int, rank: int) -> None:
    """Write `step_<step>_rank_<rank>.json` and `.safetensors` to `folder`. A disk that takes nothing is warned about:
    the run has not failed yet.

    Args:
        batch: With rollouts, this rank's.
        step: Batches of prompts before this one.
    """
    rollouts = batch.rollouts
    assert rollouts is not None, "a step that was skipped had rollouts"
    described = _described(batch, rollouts, skipped) | {"step": step, "rank": rank}
    tensors = {
        name: getattr(rollouts, name)
        for name in ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths", "rollout_log_probs")
    }
    tensors |= {"policy_log_probs": skipped.policy_log_probs}
    tensors |= {"rewards": rollouts.rewards, "advantages": skipped.advantages}
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    try:
        write_whole(folder / f"step_{step}_rank_{rank}.safetensors", content)
        text = json.dumps(described, indent=1, ensure_ascii=False)
        write_whole(folder / f"step_{step}_rank_{rank}.json", text.encode())
    except OSError as error:
        warnings.warn(f"The batch of a skipped step could not be saved: {error}.", stacklevel=2)


def _described(batch: PromptBatch, rollouts: RolloutBatch, skipped: SkippedStep) -> dict[str, Any]:
    m = rollouts.group_size
    rewards, advantages = rollouts.rewards.tolist(), skipped.advantages.tolist()
    return {
        "weights_version": rollouts.weights_version,
        "inner_epoch": skipped.inner_epoch,
        "loss": _number(skipped.loss),
        "kl": _number(skipped.kl),
        "grad_norm": _number(skipped.grad_norm),
        "parameters_with_a_gradient_that_is_not_finite": skipped.parameters,
        "prompts": [
            {
                "id": batch.ids[p],
                "prompt": batch.prompts[p],
                "completions": rollouts.completions[p * m : (p + 1) * m],
                "rewards": [_number(value) for value in rewards[p]],
                "advantages": [_number(value) for value in advantages[p]],
            }
            for p in range(len(batch))
        ],
    }


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: these are text."""
    return value if math.isfinite(value) else str(value)
