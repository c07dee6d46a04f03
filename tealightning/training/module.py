"""LightningModule of post-training: rewards -> advantages -> loss -> optimizer step.

It knows nothing of engines or rewards' makers: `batch.rollouts` is there when `training_step` is called.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.pretrained import load_policy, load_tokenizer, policy_config
from tealightning.reliability.progress import beat
from tealightning.training.evaluation import BestOfNEvaluation, rollouts_of
from tealightning.training.lora import (
    LoRA,
    WithoutAdapter,
    add_adapter,
    add_frozen,
    check_checkpoint,
    drop_frozen,
    merged_state_dict,
)
from tealightning.training.loss import PolicyGradientLoss, StepBatch, merge_sums, micro_batch_loss
from tealightning.training.micro_batches import score_completions, split_rows, tokens_of_a_pass
from tealightning.training.nonfinite import (
    SkippedSteps,
    is_not_finite,
    load_count,
    save_count,
    skipped_step,
    unclipped_norm,
)
from tealightning.training.settings import check_correction, check_settings
from tealightning.training.sharding import is_sharded, shard, whole, whole_state_dict
from tealightning.types import PromptBatch, RolloutBatch

AdvantageScale = Literal["none", "batch_rms"]
InnerEpochCorrection = Literal["clip", "exact"]


class PostTrainingModule(BestOfNEvaluation):
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
        inner_epoch_correction: How inner epochs after the first account for a policy that has moved since it was
            sampled from: `clip` keeps the advantages and clips the ratio of each token (PPO); `exact` computes
            advantages anew from the ratios of whole completions, unbiased at any distance but noisier the further it
            is (estimators with an off-policy form: max_at_k without a scale).
        micro_batch_tokens: Padded tokens of one forward and backward pass: decides memory and speed, never the
            gradient. None = 16,384 on a GPU and 2,048 on a CPU.
        micro_batch_size: Most rollouts of one pass; None = as many as fit.
        gradient_clip_norm: Largest gradient norm; None = no clipping.
        optimizer: Built with the policy's trainable parameters.
        lr_scheduler: Built with the optimizer and stepped once a rollout step, unless the step was skipped because its
            gradient was not finite: a schedule of `max_steps` ends with the run.
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
        advantage_scale: AdvantageScale = "batch_rms",
        inner_epochs: int = 1,
        inner_epoch_correction: InnerEpochCorrection = "clip",
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
        super().__init__(ns=ns, extrapolate_ns=extrapolate_ns)
        check_settings(advantage_scale, inner_epochs, micro_batch_tokens, micro_batch_size, gradient_clip_norm)
        if reference is not None and not (loss and loss.kl_coef > 0):
            warnings.warn("model.reference has no effect without a KL penalty (loss.kl_coef > 0).", stacklevel=2)
        check_correction(inner_epoch_correction, estimator, loss, inner_epochs)
        self.automatic_optimization = False
        self.policy_path = policy
        self.reference_path = reference or policy
        self.lora = lora
        self._reference_is_base = lora is not None and reference is None
        self.estimator = estimator
        self.loss = loss or PolicyGradientLoss()
        self.advantage_scale = advantage_scale
        self.inner_epochs = inner_epochs
        self.is_exact_off_policy = inner_epoch_correction == "exact"
        self._micro_batch_tokens = micro_batch_tokens
        self.micro_batch_size = micro_batch_size
        self.gradient_clip_norm = gradient_clip_norm
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.load_kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        self.gradient_checkpointing = gradient_checkpointing
        self.policy: Any = None  # a transformers.PreTrainedModel once `configure_model` ran
        self.skipped = SkippedSteps()
        self._reference: tuple[Any, ...] = ()  # in a tuple: no submodule, so neither checkpointed nor wrapped

    # ---------------------------------------------------------------- loading

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return load_tokenizer(self.policy_path, trust_remote_code=self.load_kwargs["trust_remote_code"])

    @cached_property
    def policy_config(self) -> Any:
        """The policy's configuration as it is saved; needs no weights."""
        return policy_config(self.policy_path, trust_remote_code=self.load_kwargs["trust_remote_code"])

    @property
    def micro_batch_tokens(self) -> int:
        """Padded tokens of one forward and backward pass, on the device where the policy is."""
        return self._micro_batch_tokens or tokens_of_a_pass(self.device)

    @property
    def reference(self) -> Any:
        """The frozen model that the KL is measured to; None where it is not loaded."""
        if self._reference:
            return self._reference[0]
        return WithoutAdapter(self.policy) if self._reference_is_base else None

    def setup(self, stage: str) -> None:
        """Load the reference if there is a KL penalty to train with. Safe to call again."""
        if stage == "fit" and self.loss.kl_coef > 0 and not self._reference and not self._reference_is_base:
            reference = load_policy(self.reference_path, argument="reference", **self.load_kwargs)
            self._reference = (reference.requires_grad_(False).eval(),)

    def configure_model(self) -> None:
        """Load the policy, with its adapter. Safe to call again."""
        if self.policy is not None:
            return
        self.policy = load_policy(
            self.policy_path, gradient_checkpointing=self.gradient_checkpointing, **self.load_kwargs
        )
        if self.lora is not None:
            add_adapter(self.policy, self.lora)
        if self._reference_is_base and self.loss.kl_coef > 0:
            self._reference = (WithoutAdapter(self.policy),)
        if self.device_mesh is not None:  # of trainer.strategy=ModelParallelStrategy
            for model in (self.policy, *self._reference):
                shard(model, self.device_mesh, lora=self.lora is not None)

    def on_fit_start(self) -> None:
        if self.trainer.precision == "16-mixed":  # clipping would take its scaled gradients for the real ones
            raise UserError("trainer.precision=16-mixed is not supported: use bf16-mixed, bf16-true or 32-true.")
        for reference in self._reference:
            reference.to(self.device)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return [optimizer], [self.lr_scheduler(optimizer)]

    def export(self, folder: str) -> None:
        """Save policy and tokenizer in Hugging Face format (safetensors), loadable by transformers and vLLM. An adapter
        is merged into the weights. Rank 0 writes, and all ranks must call it: a sharded policy is gathered."""
        state = merged_state_dict(self.policy) if self.lora else whole_state_dict(self.policy)
        if self.global_rank == 0:
            self.policy.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop_frozen(self, checkpoint, self.lora)
        save_count(checkpoint, self.skipped)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.lora)
        load_count(checkpoint, self.skipped)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also without the frozen weights, which an adapter's checkpoint leaves out."""
        state = state_dict if self.lora is None else add_frozen(self, state_dict)
        return super().load_state_dict(state, strict=strict, assign=assign)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        step = self._step_batch(rollouts_of(batch))
        sampled_log_probs = self._sampled_log_probs(step) if self.inner_epochs > 1 else None
        sums: dict[str, Tensor] = {}
        trained_tokens = 0
        self.skipped.begin()
        for epoch in range(self.inner_epochs):
            if epoch > 0:
                assert sampled_log_probs is not None, "there is more than one inner epoch"
                step = self._step_moved_on(step, sampled_log_probs)
            epoch_sums = self._optimizer_step(step, record=sampled_log_probs if epoch == 0 else None, epoch=epoch)
            trained_tokens += int(epoch_sums.get("tokens", 0))
            sums |= epoch_sums
            if self.skipped.last is not None:  # the weights are where they were: later epochs would fail the same way
                break
        if self.lr_scheduler is not None and (self.skipped.last is None or epoch > 0):
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        self.skipped.end()
        self._log_step(step, sums, trained_tokens)

    def _step_batch(self, rollouts: RolloutBatch) -> StepBatch:
        """Advantages, the rollouts to train on and the log-probs that stay fixed during the step."""
        advantages = self._scaled(self.estimator(rollouts.rewards, rollouts.valid), rollouts)
        rows = self._rows_to_train(rollouts, advantages)
        scored = rollouts.valid.flatten()
        return StepBatch(
            rollouts=rollouts,
            advantages=advantages.flatten(),
            rows=rows,
            num_tokens=self._over_ranks(rollouts.completion_lengths[scored].sum()),
            num_sequences=self._over_ranks(scored.sum()),
            ref_log_probs=self._frozen_log_probs(self._reference[0], rollouts, rows) if self._reference else None,
        )

    def _sampled_log_probs(self, step: StepBatch) -> Tensor:
        """[B, T] for the log-probs under the weights that sampled. The first inner epoch's own forward pass records
        them; exact correction also wants those of rollouts that are not trained on."""
        scored = step.rollouts.valid.flatten()
        scored[step.rows] = False
        others = scored.nonzero().squeeze(1) if self.is_exact_off_policy else step.rows[:0]
        return self._frozen_log_probs(self.policy, step.rollouts, others)

    def _step_moved_on(self, step: StepBatch, sampled_log_probs: Tensor) -> StepBatch:
        """The step for the policy as it is after an inner epoch: the loss compares it with the one that sampled. With
        exact correction advantages from the ratios of whole completions replace the loss's own ratios."""
        if not self.is_exact_off_policy:
            return replace(step, behaviour_log_probs=sampled_log_probs)
        rollouts = step.rollouts
        scored = rollouts.valid.flatten().nonzero().squeeze(1)
        log_ratios = (self._frozen_log_probs(self.policy, rollouts, scored) - sampled_log_probs).double().sum(dim=1)
        ratios = (
            log_ratios.view_as(rollouts.rewards).clamp(max=700).exp()
        )  # finite; estimators decide what is too large
        advantages = self._scaled(self.estimator.off_policy(rollouts.rewards, ratios, rollouts.valid), rollouts)
        rows = self._rows_to_train(rollouts, advantages)
        return replace(step, advantages=advantages.flatten(), rows=rows, behaviour_log_probs=None)

    def _scaled(self, advantages: Tensor, rollouts: RolloutBatch) -> Tensor:
        """[P, m] float64: advantages over their RMS in the batch if asked for."""
        if self.advantage_scale == "none":
            return advantages
        square_mean = self._over_ranks((advantages**2).sum()) / self._over_ranks(rollouts.valid.sum()).clamp(min=1)
        return advantages / square_mean.sqrt() if square_mean > 0 else advantages

    def _rows_to_train(self, rollouts: RolloutBatch, advantages: Tensor) -> Tensor:
        """[R] indices of the rollouts that a loss term needs: all scored ones with a KL penalty, else those with an
        advantage. Leaving the others out changes no gradient: the denominators stay the whole batch's."""
        needed = rollouts.valid if self.loss.kl_coef > 0 else advantages != 0
        needed = needed.flatten() & (rollouts.completion_lengths > 0)
        return needed.nonzero().squeeze(1)

    def _micro_batches(self, model: Any, rollouts: RolloutBatch, rows: Tensor, *, at_least: int = 0) -> list[Tensor]:
        """Micro-batches of `rows`. Empty ones follow where the other ranks of a sharded model have more: it is called
        by all of them together or not at all."""
        splits = split_rows(
            rollouts.prompt_lengths,
            rollouts.completion_lengths,
            rows,
            max_tokens=self.micro_batch_tokens,
            max_rows=self.micro_batch_size,
        )
        calls = max(at_least, len(splits))
        if is_sharded(model):
            calls = int(self._over_ranks(torch.tensor(calls, device=self.device), "max"))
        return splits + [rows[:0]] * (calls - len(splits))

    @torch.no_grad()
    def _frozen_log_probs(self, model: Any, rollouts: RolloutBatch, rows: Tensor) -> Tensor:
        """[B, T] log-probs of `rows` without gradient; 0 elsewhere."""
        log_probs = torch.zeros_like(rollouts.rollout_log_probs)
        for chosen in self._micro_batches(model, rollouts, rows):
            scores = score_completions(model, rollouts, _some(chosen))
            if len(chosen) > 0:
                log_probs[chosen, : scores.mask.shape[1]] = scores.log_probs
            beat()
        return log_probs

    def _optimizer_step(self, step: StepBatch, *, epoch: int, record: Tensor | None) -> dict[str, Tensor]:
        """One pass over the step's rollouts, one optimizer step; returns the metrics' sums over this rank.

        Where loss or gradient is not finite on any rank, no rank steps.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        log_probs = torch.zeros_like(step.rollouts.rollout_log_probs) if record is None else record
        sums = self._backward(step, is_first=epoch == 0, record=log_probs)
        norm = unclipped_norm(self.policy)
        sums["grad_norm"] = whole(norm)
        if self._over_ranks(is_not_finite(sums), "max"):
            advantages = step.advantages.view_as(step.rollouts.rewards)
            self.skipped.add(skipped_step(sums, self.policy, epoch, advantages, log_probs))
            return sums
        max_norm = self.gradient_clip_norm if self.gradient_clip_norm is not None else float("inf")
        torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), max_norm, norm)
        optimizer.step()
        return sums

    def _backward(self, step: StepBatch, *, is_first: bool, record: Tensor) -> dict[str, Tensor]:
        """Add up the gradient over micro-batches; ranks meet in the last one's backward. `record` [B, T] takes the
        log-probs.

        Entropy and the engine/trainer mismatch are those of the sampling weights: of the first inner epoch only.
        """
        # A rank with nothing to train still has to meet the others in backward: in a rollout weighted by 0.
        splits = self._micro_batches(self.policy, step.rollouts, step.rows, at_least=1)
        sums: dict[str, Tensor] = {}
        for index, chosen in enumerate(splits):
            with self._gradient_sync(index == len(splits) - 1):
                scores = score_completions(self.policy, step.rollouts, _some(chosen), with_entropy=is_first)
                loss, part = micro_batch_loss(self.loss, step, _some(chosen), scores)
                self.manual_backward(loss if len(chosen) > 0 else loss * 0)
            beat()
            if len(chosen) > 0:
                merge_sums(sums, part)
                record[chosen, : scores.mask.shape[1]] = scores.log_probs.detach()
        return sums

    def _over_ranks(self, value: Tensor, op: str = "mean") -> Tensor:
        """`value` reduced over ranks. The mean fits data parallelism, which averages the ranks' gradients."""
        return self.trainer.strategy.reduce(value.detach().double(), reduce_op=op)

    def _gradient_sync(self, wanted: bool) -> Any:
        """Whether ranks exchange gradients in the backward pass inside."""
        if is_sharded(self.policy):
            self.policy.set_requires_gradient_sync(wanted)
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if block is not None and not wanted else nullcontext()

    def _log_step(self, step: StepBatch, sums: dict[str, Tensor], trained_tokens: int) -> None:
        """Log the step's metrics, reduced over ranks."""
        zero = torch.zeros((), device=self.device)
        keys = ["policy_loss", "clipped", "entropy", "kl", "mismatch", "tokens"]
        totals = self._over_ranks(torch.stack([sums.get(k, zero).double() for k in keys]), "sum")
        total = dict(zip(keys, totals, strict=True))
        tokens = total["tokens"].clamp(min=1)
        small = (step.rollouts.valid.sum(dim=1) < self.estimator.min_group_size).double().mean()
        metrics = {
            "train/policy_loss": total["policy_loss"] / self.trainer.world_size,
            "train/clip_fraction": total["clipped"] / tokens,
            "train/entropy": total["entropy"] / tokens,
            "train/grad_norm": sums["grad_norm"],
            "train/nonfinite_steps": self.skipped.total,
            "train/lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            "train/advantage_std": self._over_ranks(step.advantages.std()),
            "train/trained_tokens": self._over_ranks(zero + trained_tokens, "sum"),
            "train/rollouts_skipped": self._over_ranks(zero + 1 - len(step.rows) / len(step.advantages)),
            "train/groups_too_small": self._over_ranks(small),
            "rollout/log_prob_abs_diff_mean": total["mismatch"] / tokens,
            "rollout/log_prob_abs_diff_max": self._over_ranks(sums.get("mismatch_max", zero), "max"),
        }
        if self._reference:
            metrics["train/kl"] = total["kl"] / tokens
        self.log_dict({k: float(v) for k, v in metrics.items()}, batch_size=len(step.rollouts.rewards))


def _some(chosen: Tensor) -> Tensor:
    """The micro-batch, or any rollout in place of none: a model that ranks call together wants an input."""
    return chosen if len(chosen) > 0 else chosen.new_zeros(1)
