"""Health checks: watch a training run for what is wrong without an error, and warn or stop it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import save

from tealightning.callbacks.health_checks import HEALTH_CHECKS, HealthCheck, StepSummary
from tealightning.callbacks.rollout import RolloutCallback
from tealightning.errors import UserError
from tealightning.functional.tail_checks import TIE_CAUSES, tie_cause, tied
from tealightning.registry import did_you_mean
from tealightning.reliability.files import going_on_without, run_folder, write_whole
from tealightning.training.nonfinite import UnhealthyRun
from tealightning.types import PromptBatch, SkippedStep

_AT_LEAST_ONE = ("max_nonfinite_steps", "max_degenerate_steps", "max_log_prob_growth", "patience")


@dataclass(kw_only=True, eq=False)
class HealthChecks(Callback):
    """Looks at what every training step has logged. A check that fails is counted (`train/health_{check}`) and warned
    about once an episode, or, for the checks in `stop_on`, ends the run with an `UnhealthyRun` on all ranks.

    It changes nothing: a run in which nothing is wrong is the same to the last digit. null switches a check off.
    `drift` and `stale_ahead` are `mismatch` and `stale_weights` for rollouts of older weights (rollout.steps_ahead).

    Args:
        stop_on: Checks that end the run; the others warn. Of nonfinite, weights_version, mismatch, drift,
            stale_weights, stale_ahead, unknown_tokens, reward_ties, degenerate, kl, entropy, and your own.
        max_nonfinite_steps: `nonfinite`: steps in a row whose loss or gradient is NaN or infinite (none is taken).
        max_saved_batches: Batches of such steps that are saved, in `unhealthy/` of the run's folder.
        max_log_prob_diff: `mismatch`: mean difference of engine's and trainer's log-probs of sampled tokens, in nats.
        max_log_prob_growth: `stale_weights`: how many times that difference may be what it was at the first step.
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

    stop_on: Sequence[str] = ("nonfinite", "weights_version", "mismatch", "stale_weights")
    max_nonfinite_steps: int | None = 5
    max_saved_batches: int = 3
    max_log_prob_diff: float | None = 0.2
    max_log_prob_growth: float | None = 5.0
    max_version_lag: int | None = 0
    max_unknown_tokens: int | None = 0
    max_reward_ties: float | None = 0.2
    max_degenerate_steps: int | None = 20
    max_kl: float | None = 1.0
    min_entropy_share: float | None = 0.05
    patience: int = 10

    def __post_init__(self) -> None:
        for name in self.stop_on:
            if name not in HEALTH_CHECKS:
                raise UserError(f"health.stop_on: there is no check {name!r}.{did_you_mean(name, HEALTH_CHECKS)}")
        for name in (field.name for field in fields(self) if field.name != "stop_on"):
            limit, lowest = getattr(self, name), 1 if name in _AT_LEAST_ONE else 0
            if limit is not None and not limit >= lowest:
                raise UserError(f"health.{name} must be at least {lowest}, or null for no check, got {limit}.")
        self.saved_batches = 0
        self._global_step = 0  # before the step under way
        self._checks: dict[str, HealthCheck] = {}
        for name, check in HEALTH_CHECKS.items():
            limit = getattr(self, check.limit_from, check.limit)
            patience = getattr(self, check.patience_from, check.patience)
            if limit is not None and patience is not None:
                self._checks[name] = replace(check, limit=limit, patience=patience)

    @property
    def counts(self) -> dict[str, int]:
        """Steps at which each check that is on has failed so far."""
        return {name: check.total for name, check in self._checks.items()}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._global_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        step = self._summary(trainer, pl_module, batch)
        if step.skipped is not None and self.saved_batches < self.max_saved_batches:
            self.saved_batches += 1
            where = {"step": trainer.fit_loop.total_batch_idx, "rank": trainer.global_rank}
            _save_batch(run_folder(trainer) / "unhealthy", batch, step.skipped, where)
        problems = {name: check.look(step) for name, check in self._checks.items()}
        for name, total in self.counts.items():
            pl_module.log(f"train/health_{name}", float(total))
        for name, problem in problems.items():
            if problem is not None:
                self._report(name, problem)

    def _summary(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch) -> StepSummary:
        rollouts, rewards = batch.attached_rollouts, batch.attached_rollouts.rewards.cpu()
        sampler = next((c for c in trainer.callbacks if isinstance(c, RolloutCallback)), None)  # type: ignore[attr-defined]
        unknown = (rollouts.completion_ids >= len(pl_module.tokenizer)) & rollouts.completion_mask
        cause = tie_cause(rewards, tied(rewards, rollouts.completions))
        # A number in the place of the cause, because that is what ranks can exchange.
        own = {"unknown_tokens": unknown.sum(), "cause": TIE_CAUSES.index(cause) if cause else -1}
        highest = pl_module.over_ranks(own, "max")
        return StepSummary(
            metrics=trainer.callback_metrics | {"unknown_tokens": highest["unknown_tokens"]},
            skipped=pl_module.skipped.last,
            global_step=self._global_step,
            weights_version=rollouts.weights_version if sampler else self._global_step,
            steps_ahead=sampler.steps_ahead * pl_module.inner_epochs if sampler else 0,
            tie_cause=TIE_CAUSES[int(highest["cause"])] if highest["cause"] >= 0 else None,
        )

    def _report(self, name: str, problem: str) -> None:
        check = HEALTH_CHECKS[name]
        setting = check.limit_from or check.patience_from
        text = f"{problem}. (Health check {name}{f'; health.{setting}=null switches it off' if setting else ''}.)"
        if name in self.stop_on:
            raise UnhealthyRun(f"Training was stopped after optimizer step {self._global_step}: {text}")
        rank_zero_warn(f"After optimizer step {self._global_step}: {text}")

    def state_dict(self) -> dict[str, Any]:
        checks = {name: check.state_dict() for name, check in self._checks.items()}
        return {"checks": checks, "saved_batches": self.saved_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved_batches = state_dict["saved_batches"]
        for name in self._checks.keys() & state_dict["checks"].keys():
            self._checks[name].load_state_dict(state_dict["checks"][name])


def _save_batch(folder: Path, batch: PromptBatch, skipped: SkippedStep, where: dict[str, int]) -> None:
    """Write this rank's batch to `step_<step>_rank_<rank>.json` and `.safetensors`, if the disk takes it."""
    rollouts, m = batch.attached_rollouts, batch.attached_rollouts.group_size
    names = ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths", "rollout_log_probs", "rewards")
    tensors = {name: getattr(rollouts, name) for name in names}
    tensors |= {name: getattr(skipped, name) for name in ("policy_log_probs", "advantages")}
    described = {
        "weights_version": rollouts.weights_version,
        "inner_epoch": skipped.inner_epoch,
        **{name: _number(getattr(skipped, name)) for name in ("loss", "kl", "grad_norm")},
        "parameters_with_a_gradient_that_is_not_finite": skipped.parameters,
        "prompts": [
            {
                "id": batch.ids[p],
                "prompt": batch.prompts[p],
                "completions": rollouts.completions[p * m : (p + 1) * m],
                "rewards": [_number(value) for value in rollouts.rewards[p].tolist()],
                "advantages": [_number(value) for value in skipped.advantages[p].tolist()],
            }
            for p in range(len(batch))
        ],
    }
    stem = f"step_{where['step']}_rank_{where['rank']}"
    with going_on_without(f"the batch of a skipped step to {folder}"):
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        write_whole(folder / f"{stem}.safetensors", content)
        write_whole(folder / f"{stem}.json", json.dumps(described | where, indent=1, ensure_ascii=False).encode())


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: these are text."""
    return value if math.isfinite(value) else str(value)
