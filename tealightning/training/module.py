"""The training loop: from the rewards of a batch of prompts to the optimizer step.

Shapes: P prompts, m rollouts each, B = P * m rollouts, T tokens of the longest completion (`types.py` has them all).

    before the step     RolloutCallback: sync weights, engine, reward        batch.rollouts: completions, rewards [P, m]
    training_step       advantages = estimator(rewards)                      [P, m], whole groups; NaN reward -> 0
                        advantages /= their root mean square                 over the batch and all ranks
                        rows = rollouts that a loss term needs               [R], at most B
                        ref_log_probs = reference(rows)                      [B, T], with a KL penalty only
      inner epochs      for chosen in micro-batches of rows:                 longest first, within a token budget
                            scores = score_completions(policy, chosen)       scoring.py: log-probs [rows, t]
                            loss = micro_batch_loss(advantages, scores)      micro_batches.py: clipped loss + KL penalty
                            backward(loss)                                   denominators are the whole batch's
                        clip the gradient, optimizer.step()                  on no rank if one is not finite
    after the step      log train/..., rollout/log_prob_...                  docs/metrics.md

The module knows no engine and no reward: `batch.rollouts` is there when `training_step` is called.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tealightning.checks import check_choice, check_integer
from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.training.lora import LoRA
from tealightning.training.micro_batches import PolicyGradientLoss, merge_sums, micro_batch_loss
from tealightning.training.nonfinite import SkippedSteps
from tealightning.training.policy_weights import gradient_sync, whole
from tealightning.training.scoring import score_completions
from tealightning.training.scoring_policy import ScoringPolicy, some
from tealightning.types import PromptBatch, RolloutBatch, StepBatch


class PostTrainingModule(ScoringPolicy):
    """Post-trains a causal LM with advantages from a pluggable estimator.

    Args:
        policy: Folder or hub id that `AutoModelForCausalLM` and `AutoTokenizer` load.
        estimator: Maps the rewards of each group to advantages.
        loss: Clipping, reduction, KL penalty and importance correction.
        reference: What the KL is measured to; None = the policy as it was loaded. Loaded only for training with
            `loss.kl_coef` > 0; with `lora` and None never, because it is the policy with its adapter off.
        lora: Train a low-rank adapter and leave the policy's own weights as they are; None = train all weights.
        advantage_scale: `batch_rms` divides all advantages of a step by their root mean square over the whole batch,
            which frees the learning rate from the reward's scale; `none` leaves them.
        inner_epochs: Optimizer steps on each batch of rollouts; above 1 the ratio clipping does its work.
        inner_epoch_correction: For inner epochs after the first, whose policy has moved since it was sampled from:
            `clip` keeps the advantages and clips the ratio of each token (PPO); `exact` computes advantages anew from
            the ratios of whole completions, unbiased but noisier the further the policy is (estimators with an
            off-policy form: max_at_k without a scale).
        share_prompts: Compute each prompt once for all rollouts of its group, in training, reference and behaviour
            log-probs, if a trial on the first batch shows that it makes no difference to the policy; False = once for
            each rollout.
        micro_batch_tokens: Padded tokens that one forward and backward pass computes: decides memory and speed, never
            the gradient. None = 16,384 on a GPU and 2,048 on a CPU.
        micro_batch_size: Most rollouts of one pass; None = as many as fit.
        gradient_clip_norm: Largest gradient norm; None = no clipping.
        optimizer: Built with the policy's trainable parameters: any that steps by gradients alone (docs/optimizers.md).
        lr_scheduler: Built with the optimizer and stepped once a rollout step that was not skipped (gradient not
            finite): a schedule of `max_steps` ends with the run. `WarmupSchedule` has transformers' schedules by name;
            `ReduceLROnPlateau` is stepped after each validation, by its `monitor`.
        dtype: Of the policy's weights: `float32`, `bfloat16` or `auto` (as saved).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more compute.
        trust_remote_code: Run model code that ships with the weights.
        ns: Best-of-n budgets of validation and test; `max(ns)` completions are sampled a prompt.
        extrapolate_ns: Budgets beyond `max(ns)` that are extrapolated and logged under their own keys.
    """

    def __init__(
        self,
        policy: str,
        estimator: AdvantageEstimator,
        *,
        loss: PolicyGradientLoss | None = None,
        reference: str | None = None,
        lora: LoRA | None = None,
        advantage_scale: Literal["none", "batch_rms"] = "batch_rms",
        inner_epochs: int = 1,
        inner_epoch_correction: Literal["clip", "exact"] = "clip",
        share_prompts: bool = True,
        micro_batch_tokens: int | None = None,
        micro_batch_size: int | None = None,
        gradient_clip_norm: float | None = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        ns: Sequence[int] = (1, 4, 16, 64, 128),
        extrapolate_ns: Sequence[int] = (),
    ) -> None:
        loss = loss or PolicyGradientLoss()
        if reference is not None and not loss.kl_coef > 0:
            warnings.warn("model.reference has no effect without a KL penalty (loss.kl_coef > 0).", stacklevel=2)
        super().__init__(
            policy,
            reference=reference,
            with_reference=loss.kl_coef > 0,
            lora=lora,
            load_kwargs={"dtype": dtype, "trust_remote_code": trust_remote_code},
            gradient_checkpointing=gradient_checkpointing,
            ns=ns,
            extrapolate_ns=extrapolate_ns,
            share_prompts=share_prompts,
            micro_batch_tokens=micro_batch_tokens,
            micro_batch_size=micro_batch_size,
        )
        self.automatic_optimization = False
        self.estimator = estimator
        self.loss = loss
        self.advantage_scale = advantage_scale
        self.inner_epochs = inner_epochs
        self.is_exact_off_policy = inner_epoch_correction == "exact"
        self.gradient_clip_norm = gradient_clip_norm
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.skipped = SkippedSteps()
        check_choice("advantage_scale", advantage_scale, ("none", "batch_rms"))
        check_choice("inner_epoch_correction", inner_epoch_correction, ("clip", "exact"))
        self._check_settings()

    def _check_settings(self) -> None:
        check_integer("inner_epochs", self.inner_epochs, 1)
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise UserError(f"gradient_clip_norm must be above 0 or null, got {self.gradient_clip_norm}.")
        if self.is_exact_off_policy and not self.estimator.has_off_policy_form:
            raise UserError(
                "inner_epoch_correction=exact needs an estimator with an off-policy form (max_at_k with scale=none), "
                f"got {self.estimator!r}."
            )
        if self.is_exact_off_policy and self.loss.importance_cap is not None:
            raise UserError(
                "inner_epoch_correction=exact and loss.importance_cap both correct ratios: set one of them only."
            )
        if self.is_exact_off_policy and self.inner_epochs == 1:
            warnings.warn("model.inner_epoch_correction=exact has no effect with inner_epochs=1.", stacklevel=3)

    # ---------------------------------------------------------------- the step, from top to bottom

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollouts = batch.attached_rollouts
        step = self._step_batch(rollouts, self.estimator(rollouts.rewards))
        sampled_log_probs = self._untrained_log_probs(step)  # the first inner epoch adds those that it trains on
        sums: dict[str, Tensor] = {}
        trained_tokens = 0
        self.skipped.begin()
        for epoch in range(self.inner_epochs):
            if epoch > 0:
                step = self._step_of_moved_policy(step, sampled_log_probs)
            epoch_sums, log_probs = self._optimizer_step(step, epoch)
            if epoch == 0:
                sampled_log_probs += log_probs
            trained_tokens += int(epoch_sums.get("tokens", 0))
            sums |= epoch_sums
            if self.skipped.last is not None:  # the weights are where they were: later epochs would fail the same way
                break
        if self.lr_scheduler is not None and (self.skipped.last is None or epoch > 0):
            self.step_schedule()
        self._log_step(step, sums, trained_tokens)

    def _step_batch(self, rollouts: RolloutBatch, advantages: Tensor) -> StepBatch:
        """The rollouts to train on, their advantages [P, m], the batch's sizes and the reference's log-probs."""
        scored = rollouts.valid.flatten()
        tokens, squares = rollouts.completion_lengths[scored].sum(), (advantages**2).sum()
        sizes = self.over_ranks({"tokens": tokens, "sequences": scored.sum(), "squares": squares}, "mean")
        advantages = self._scaled(advantages, sizes["squares"], sizes["sequences"])
        rows = self._rows_to_train(rollouts, advantages)
        return StepBatch(
            rollouts=rollouts,
            advantages=advantages.flatten(),
            rows=rows,
            num_tokens=sizes["tokens"],
            num_sequences=sizes["sequences"],
            ref_log_probs=self.frozen_log_probs(self._reference[0], rollouts, rows) if self._reference else None,
        )

    def _scaled(self, advantages: Tensor, squares: Tensor, num_sequences: Tensor) -> Tensor:
        """[P, m] float64: advantages over their root mean square in the batch, if asked for."""
        mean_square = squares / num_sequences.clamp(min=1)
        if self.advantage_scale == "none" or not mean_square > 0:
            return advantages
        return advantages / mean_square.sqrt()

    def _rows_to_train(self, rollouts: RolloutBatch, advantages: Tensor) -> Tensor:
        """[R] indices of the rollouts that a loss term needs: all scored ones with a KL penalty, else those with an
        advantage. Leaving the others out changes no gradient: the denominators stay the whole batch's."""
        needed = rollouts.valid if self.loss.kl_coef > 0 else advantages != 0
        return (needed.flatten() & (rollouts.completion_lengths > 0)).nonzero().squeeze(1)

    def _optimizer_step(self, step: StepBatch, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        """One pass over the step's rollouts and one optimizer step, which no rank takes where loss or gradient is not
        finite on any: the metrics' sums over this rank, and log-probs [B, T] of the trained rollouts before the step.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        sums, log_probs = self._backward(step, is_first=epoch == 0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        sums["grad_norm"] = whole(norm)
        is_finite = torch.stack(
            [sums[key].isfinite() for key in ("policy_loss", "kl", "grad_norm") if key in sums]
        ).all()
        highest = self.over_ranks({"not_finite": ~is_finite, "mismatch_max": sums.get("mismatch_max", 0.0)}, "max")
        if epoch == 0:
            sums["mismatch_max"] = highest["mismatch_max"]
        if highest["not_finite"]:
            self.skipped.add(sums, self.policy, epoch, step.advantages.view_as(step.rollouts.rewards), log_probs)
            return sums, log_probs
        torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), self.gradient_clip_norm or float("inf"), norm)
        optimizer.step()
        return sums, log_probs

    def _backward(self, step: StepBatch, *, is_first: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Add up the gradient over micro-batches; ranks meet in the last one's backward. Entropy and the mismatch of
        engine and trainer are those of the sampling weights: of the first inner epoch only."""
        # A rank with nothing to train still has to meet the others in backward: in a rollout weighted by 0.
        shares = self.shares_prompts(self.policy, step.rollouts, is_trained=True)
        splits = self.micro_batches(self.policy, step.rollouts, step.rows, share_prompts=shares) or [step.rows]
        sums: dict[str, Tensor] = {}
        log_probs = torch.zeros_like(step.rollouts.rollout_log_probs)
        for index, chosen in enumerate(splits):
            with gradient_sync(self.policy, self.trainer.strategy, wanted=index == len(splits) - 1):
                scores = score_completions(
                    self.policy, step.rollouts, some(chosen), with_entropy=is_first, share_prompts=shares
                )
                loss, part = micro_batch_loss(self.loss, step, some(chosen), scores)
                self.manual_backward(loss if len(chosen) > 0 else loss * 0)
            if len(chosen) > 0:
                merge_sums(sums, part)
                log_probs[chosen, : scores.mask.shape[1]] = scores.log_probs.detach().to(log_probs.dtype)
        return sums, log_probs

    def _log_step(self, step: StepBatch, sums: dict[str, Tensor], trained_tokens: int) -> None:
        """Log the step's metrics, reduced over ranks."""
        summed = ("policy_loss", "clipped", "outside", "entropy", "kl", "mismatch", "tokens")
        averaged: dict[str, Tensor | float] = {
            "train/advantage_std": step.advantages.std(),
            "train/rollouts_skipped": 1 - len(step.rows) / len(step.advantages),
            "train/groups_too_small": (step.rollouts.valid.sum(dim=1) < self.estimator.min_group_size).double().mean(),
        }
        own = averaged | {"train/trained_tokens": trained_tokens} | {key: sums.get(key, 0.0) for key in summed}
        total = self.over_ranks(own, "sum")
        tokens = total["tokens"].clamp(min=1)
        metrics = {
            "train/policy_loss": total["policy_loss"] / self.trainer.world_size,
            "train/clip_fraction": total["clipped"] / tokens,
            "train/entropy": total["entropy"] / tokens,
            "train/grad_norm": sums["grad_norm"],
            "train/nonfinite_steps": self.skipped.total,
            "train/lr": nan if (rate := self.optimizers().param_groups[0]["lr"]) is None else rate,  # type: ignore[union-attr]
            "train/trained_tokens": total["train/trained_tokens"],
            "rollout/log_prob_abs_diff_mean": total["mismatch"] / tokens,
            "rollout/log_prob_abs_diff_max": sums["mismatch_max"],
        }
        metrics |= {name: total[name] / self.trainer.world_size for name in averaged}
        if self.loss.importance_cap is not None:
            metrics["train/importance_clip_fraction"] = total["outside"] / tokens
        if self._reference:
            metrics["train/kl"] = total["kl"] / tokens
        self.log_dict({k: float(v) for k, v in metrics.items()}, batch_size=len(step.rollouts.rewards))

    # ---------------------------------------------------------------- inner epochs after the first

    def _untrained_log_probs(self, step: StepBatch) -> Tensor:
        """[B, T] log-probs, under the weights that sampled, of the scored rollouts that the step does not train on, for
        exact correction; 0 elsewhere."""
        if not self.is_exact_off_policy or self.inner_epochs == 1:
            return torch.zeros_like(step.rollouts.rollout_log_probs)
        others = step.rollouts.valid.flatten()
        others[step.rows] = False
        return self.frozen_log_probs(self.policy, step.rollouts, others.nonzero().squeeze(1))

    def _step_of_moved_policy(self, step: StepBatch, sampled_log_probs: Tensor) -> StepBatch:
        """The step for the policy as it is after an inner epoch: the loss compares it with the one that sampled. With
        exact correction advantages from the ratios of whole completions replace the loss's own ratios."""
        if not self.is_exact_off_policy:
            return replace(step, behaviour_log_probs=sampled_log_probs)
        rollouts = step.rollouts
        scored = rollouts.valid.flatten().nonzero().squeeze(1)
        log_ratios = (self.frozen_log_probs(self.policy, rollouts, scored) - sampled_log_probs).double().sum(dim=1)
        ratios = (
            log_ratios.view_as(rollouts.rewards).clamp(max=700).exp()
        )  # finite; estimators decide what is too large
        advantages = self.estimator.off_policy(rollouts.rewards, ratios)
        squares = self.over_ranks({"squares": (advantages**2).sum()}, "mean")["squares"]
        advantages = self._scaled(advantages, squares, step.num_sequences)
        rows = self._rows_to_train(rollouts, advantages)
        return replace(step, advantages=advantages.flatten(), rows=rows, behaviour_log_probs=None)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["skipped_optimizer_steps"] = self.skipped.total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.skipped.total = checkpoint.get("skipped_optimizer_steps", 0)
