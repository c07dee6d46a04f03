"""LightningModule around a causal LM: load it with reference and adapter, evaluate best-of-n, checkpoint, export."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

from tealightning.errors import UserError
from tealightning.metrics import BestOfN, TailFit
from tealightning.pretrained import base_of, load_policy, load_tokenizer, policy_config
from tealightning.training.export import save_policy, try_export
from tealightning.training.lora import LoRA, WithoutAdapter, add_adapter
from tealightning.training.policy_weights import is_sharded, policy_state_dict, shard
from tealightning.types import PromptBatch

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
_REASONS = {
    "16-mixed": ": clipping would take its scaled gradients for the real ones",
    "16-true": ": updates of float16 weights round to nothing or overflow, and become NaN within a few steps",
}


def check_precision(precision: Any) -> None:
    """Refuse what a policy cannot be trained in."""
    if precision not in PRECISIONS:
        reason = _REASONS.get(precision, "")
        raise UserError(f"trainer.precision={precision} is not supported{reason}. Use one of {', '.join(PRECISIONS)}.")


class PolicyModule(pl.LightningModule):
    """Loads, evaluates, checkpoints and exports a policy: the base class of `PostTrainingModule`, which trains it and
    documents the arguments.

    Args:
        with_reference: Whether training needs the reference.
        load_kwargs: `dtype` and `trust_remote_code` of `pretrained.load_policy`.
    """

    def __init__(
        self,
        policy: str,
        *,
        reference: str | None,
        with_reference: bool,
        lora: LoRA | None,
        load_kwargs: dict[str, Any],
        gradient_checkpointing: bool,
        ns: Sequence[int],
        extrapolate_ns: Sequence[int],
    ) -> None:
        super().__init__()
        self.policy_path = policy
        self.reference_path = reference or policy
        self.with_reference = with_reference
        self.lora = lora
        self.load_kwargs = load_kwargs
        self.gradient_checkpointing = gradient_checkpointing
        self.policy: Any = None  # a transformers.PreTrainedModel once `configure_model` ran
        self._reference_is_base = lora is not None and reference is None
        self._reference: tuple[Any, ...] = ()  # in a tuple: no submodule, so neither checkpointed nor wrapped
        self.ns, splits = sorted(ns), ("val", "test")
        self.best_of_n = nn.ModuleDict({split: BestOfN(ns=self.ns, extrapolate_ns=extrapolate_ns) for split in splits})
        self.tail_fit = nn.ModuleDict({split: TailFit() for split in splits})
        if extrapolate_ns and min(extrapolate_ns) <= self.ns[-1]:
            raise UserError(
                f"extrapolate_ns must hold budgets above max(ns)={self.ns[-1]}, up to which they are measured; got "
                f"{list(extrapolate_ns)}."
            )

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
    def reference(self) -> Any:
        """The frozen model that the KL is measured to; None where it is not loaded."""
        if self._reference:
            return self._reference[0]
        return WithoutAdapter(self.policy) if self._reference_is_base else None

    def setup(self, stage: str) -> None:
        """Load the reference if training needs one. Safe to call again."""
        if stage == "fit" and self.with_reference and not self._reference and not self._reference_is_base:
            reference = load_policy(self.reference_path, argument="reference", **self.load_kwargs)
            self._reference = (reference.requires_grad_(False).eval(),)

    def configure_callbacks(self) -> list[Any]:
        """None of its own; but BaseFinetuning freezes layers in its `setup`, before Lightning loads a policy."""
        finetuning = [c for c in self.trainer.callbacks if isinstance(c, BaseFinetuning)]  # type: ignore[attr-defined]
        if any(not isinstance(callback, BackboneFinetuning) for callback in finetuning):  # that one is refused
            self.configure_model()
        return []

    def configure_model(self) -> None:
        """Load the policy, with its adapter. Safe to call again."""
        if self.policy is not None:
            return
        settings = self.load_kwargs | {"gradient_checkpointing": self.gradient_checkpointing}
        self.policy = load_policy(self.policy_path, **settings)
        if self.lora is not None:
            add_adapter(self.policy, self.lora)
        if self._reference_is_base and self.with_reference:
            self._reference = (WithoutAdapter(self.policy),)
        if self.device_mesh is not None:  # of trainer.strategy=ModelParallelStrategy
            for model in (self.policy, *self._reference):
                shard(model, self.device_mesh, lora=self.lora is not None)

    def on_fit_start(self) -> None:
        check_precision(self.trainer.precision)
        for reference in self._reference:
            reference.to(self.device)

    def served_path(self) -> str:
        """Folder or hub id from which an engine loads a model of the policy's shape, before it gets the weights: where
        the policy's is an adapter its base, or a merged copy if the adapter has resized or untied the embedding."""
        base = base_of(self.policy_path)
        if base == self.policy_path:
            return base
        config = policy_config(base, trust_remote_code=self.load_kwargs["trust_remote_code"])
        if _shape(config) == _shape(self.policy.config):
            return base
        if is_sharded(self.policy):
            raise UserError(
                f"model.policy={self.policy_path!r} is an adapter that changes the shape of its base, and a sharded "
                "policy is not copied for an engine: merge it into a folder of its own and name that."
            )
        folder = tempfile.mkdtemp(prefix="tealightning-merged-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        save_policy(self.policy, self.tokenizer, folder, policy_state_dict(self.policy))
        return folder

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._update_metrics("val", batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._update_metrics("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _update_metrics(self, split: str, batch: PromptBatch) -> None:
        rewards = batch.attached_rollouts.rewards
        for metrics in (self.best_of_n, self.tail_fit):
            metrics[split].update(rewards, keys=batch.keys.to(rewards.device))  # type: ignore[operator]

    def _log_metrics(self, split: str) -> None:
        for metrics in (self.best_of_n, self.tail_fit):
            metric: Any = metrics[split]
            values = {f"{split}/{key}": value for key, value in metric.compute().items()}
            self.log_dict(values, sync_dist=True)  # the same on all ranks already; says so to Lightning
            metric.reset()

    # ---------------------------------------------------------------- checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights, which are in the policy's folder, and note the adapter's settings."""
        if self.lora is not None:
            frozen, state = self._frozen_names(), checkpoint["state_dict"]
            if "averaging_state" not in checkpoint:  # Lightning's WeightAveraging loads its average strictly
                checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}
            checkpoint["lora"] = asdict(self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings of the adapter, whose weights would be another policy's."""
        saved, own = checkpoint.get("lora"), None if self.lora is None else asdict(self.lora)
        if saved != own:
            raise UserError(
                f"the checkpoint was written with model.lora={saved or 'null'} and this run has {own or 'null'}: "
                "resume with the same."
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also without the frozen weights, which an adapter's checkpoint lacks; strict loading misses no others."""
        if self.lora is not None:
            frozen = self._frozen_names()
            own = {name: value for name, value in self.state_dict().items() if name in frozen}
            state_dict = own | dict(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _frozen_names(self) -> set[str]:
        return {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def export(self, folder: str) -> None:
        """Save policy and tokenizer in Hugging Face format (safetensors), loadable by transformers and vLLM. An adapter
        is merged into the weights. Rank 0 writes, and all ranks must call it: a sharded policy is gathered."""
        state = policy_state_dict(self.policy)
        if self.global_rank == 0:
            save_policy(self.policy, self.tokenizer, folder, state)

    def try_export(self) -> None:
        """Refuse a policy that could not be exported: needs no weights, for a run to know at its start."""
        try_export(base_of(self.policy_path), self.policy_config, self.tokenizer)


def _shape(config: Any) -> tuple[int, bool]:
    """What a merged adapter can change of a configuration."""
    return config.get_text_config().vocab_size, config.tie_word_embeddings
