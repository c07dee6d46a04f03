"""Check a whole run before anything is loaded: settings against each other, then what is on the disk.

What one class can tell about its own arguments its constructor has refused already.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.callbacks import BestOfNReport, EvaluationRecord, ExportPolicy, RolloutCallback
from tealightning.callbacks.lightning_callbacks import check_callbacks
from tealightning.cli.monitors import check_monitors
from tealightning.cli.user_settings import imported_class, inner_key
from tealightning.data import PromptDataModule
from tealightning.data.sources import check_source
from tealightning.errors import UserError
from tealightning.pretrained import check_weights, policy_config, positions_of
from tealightning.reliability.files import check_writable
from tealightning.training.module import PostTrainingModule
from tealightning.training.policy_module import check_precision
from tealightning.types import Split

if TYPE_CHECKING:
    from tealightning.cli.training import TrainingCLI

PHASES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""What a command reads of the data; the first of them it must have."""


def check_classes(settings: Any, key: str = "") -> None:
    """Refuse a `class_path` that is no class: where a callable is taken, jsonargparse would call any function."""
    for item in settings if isinstance(settings, list) else ():
        check_classes(item, key)
    entries = vars(settings) if isinstance(settings, Namespace) else settings if isinstance(settings, dict) else {}
    path = entries.get("class_path")
    if isinstance(path, str) and imported_class(path) is None:
        raise UserError(f"{key}: {path} is not a class. `class_path` takes classes only.")
    for name, value in entries.items():
        check_classes(value, inner_key(key, name))


def check_together(cli: "TrainingCLI") -> None:
    """Refuse settings of different sections that do not go together. It reads no file."""
    rollout = _callbacks(cli, RolloutCallback)[0]
    if cli.command == "fit":
        with cli.naming("rollout.group_size"):
            cli.model.estimator.check_group_size(rollout.group_size)
        with cli.naming("rollout"):
            rollout.check(cli.command, cli.model)
    if cli.command == "fit":
        check_callbacks(cli.trainer.callbacks, cli.trainer.strategy)  # type: ignore[attr-defined]
    for message in _contradictions(cli, rollout):
        raise UserError(message)
    if cli.command == "fit":
        # As asked for, whatever Lightning makes of it: bf16-mixed of 16-mixed, where there is no GPU.
        is_half = str(cli.resolved.trainer.precision) in ("16", "16-mixed")
        check_precision("16-mixed" if is_half else cli.trainer.precision)
    if cli.command == "fit" and isinstance(cli.model, PostTrainingModule):
        cli.model.trainer = cli.trainer
        with cli.naming("model.optimizer"):
            optimizer = cli.model.try_optimizer()
        with cli.naming("model.lr_scheduler"):
            scheduler = cli.model.try_schedule(optimizer)
        check_monitors(cli, scheduler)
        _warn_of_settings_without_effect(cli.resolved.trainer)


def _warn_of_settings_without_effect(settings: Any) -> None:
    if not settings.use_distributed_sampler:
        rank_zero_warn("trainer.use_distributed_sampler=false has no effect: each rank takes its share of the prompts.")
    if settings.reload_dataloaders_every_n_epochs:
        rank_zero_warn("trainer.reload_dataloaders_every_n_epochs has no effect: prompts are read once, at the start.")
    if settings.max_steps == 0 or settings.max_epochs == 0:
        rank_zero_warn("trainer.max_steps=0 or max_epochs=0: nothing is trained, and what ends a run is done at once.")


def _contradictions(cli: "TrainingCLI", rollout: RolloutCallback) -> Iterator[str]:
    settings, phase = cli.resolved.trainer, PHASES[cli.command][0]
    if cli.command == "fit":
        if settings.gradient_clip_val:
            yield "trainer.gradient_clip_val is not supported: set model.gradient_clip_norm instead."
        if settings.accumulate_grad_batches != 1:
            yield "trainer.accumulate_grad_batches is not supported: see data.batch_size and model.micro_batch_tokens."
        if settings.gradient_clip_algorithm is not None:
            yield "trainer.gradient_clip_algorithm is not supported: model.gradient_clip_norm clips the norm."
        if settings.limit_train_batches == 0:
            yield "trainer.limit_train_batches=0 trains nothing: use `tealightning validate` to evaluate the policy."
    # What Lightning takes without a word, and fails on in the middle of a run.
    if settings.val_check_interval == 0:
        yield "trainer.val_check_interval must be above 0, got 0; without validation: trainer.limit_val_batches=0."
    for name, least in (("log_every_n_steps", 0), ("num_sanity_val_steps", -1), ("check_val_every_n_epoch", 1)):
        if (value := getattr(settings, name)) is not None and value < least:
            yield f"trainer.{name} must be at least {least}, got {value}."
    new, longest = rollout.sampling.max_new_tokens, rollout.max_model_len
    if longest is not None and new >= longest:
        yield f"rollout.sampling.max_new_tokens={new} leaves no room for a prompt in rollout.max_model_len={longest}."
    most, defaults = max(cli.model.ns), inspect.signature(EvaluationRecord).parameters
    for record in _callbacks(cli, EvaluationRecord):
        for name in ("kl_samples", "diversity_samples"):  # their defaults take what is there
            if (value := getattr(record, name)) > max(most, 2) and value != defaults[name].default:
                yield f"trainer.callbacks.{name} must be at most max(model.ns)={most}, got {value}."
    if isinstance(cli.datamodule, PromptDataModule):
        where = "give it a file or a data set of the hub"
        if cli.datamodule.sources[phase] is None:
            yield f"data.{phase} is not set: {where}."
        if cli.command == "fit" and cli.datamodule.sources["val"] is None and _callbacks(cli, BestOfNReport):
            yield f"data.val is not set: {where}, or leave out BestOfNReport, which compares validations."


def check_inputs(cli: "TrainingCLI") -> None:
    """Refuse a run whose prompts, policy, reference, reward or checkpoint is not there or not of the right kind."""
    rollout = _callbacks(cli, RolloutCallback)[0]
    for phase in PHASES[cli.command] if isinstance(cli.datamodule, PromptDataModule) else ():
        with cli.naming(f"data.{phase}"):
            if (source := cli.datamodule.sources[phase]) is not None:
                check_source(source)
    checkpoint = str(cli.resolved.get("ckpt_path") or "")
    # A keyword of Lightning's (`last`, `best`) or a url is looked up later.
    is_path = ("/" in checkpoint or checkpoint.endswith(".ckpt")) and "://" not in checkpoint
    if is_path and not Path(checkpoint).expanduser().exists():
        raise UserError(f"ckpt_path: there is no file {Path(checkpoint).expanduser().absolute()}.")
    if isinstance(model := cli.model, PostTrainingModule):
        with cli.naming("model.policy"):
            check_weights(model.policy_path)
            positions = positions_of(model.policy_config)
            _ = model.tokenizer
            if cli.command == "fit" and _callbacks(cli, ExportPolicy):
                model.try_export()
        measures_kl = any(record.kl_samples for record in _callbacks(cli, EvaluationRecord))
        needs_reference = measures_kl or (cli.command == "fit" and model.loss.kl_coef > 0)
        if needs_reference and model.reference_path != model.policy_path:
            with cli.naming("model.reference"):
                trusted = model.load_kwargs["trust_remote_code"]
                policy_config(model.reference_path, argument="reference", trust_remote_code=trusted)
                check_weights(model.reference_path, argument="reference")
        new, longest = rollout.sampling.max_new_tokens, rollout.max_model_len
        if positions is not None and (longest or new + 1) > positions:
            setting = f"rollout.max_model_len={longest}" if longest else f"rollout.sampling.max_new_tokens={new}"
            raise UserError(f"{setting}: prompt and completion must fit into the policy's {positions} positions.")
    for callback in _callbacks(cli, Checkpoint):
        if "://" not in (folder := str(getattr(callback, "dirpath", None) or "")) and folder:
            with cli.naming("trainer.callbacks.dirpath"):
                check_writable(Path(folder))
    with cli.naming("rollout.engine"):
        rollout.engine.check()
    rewards = [("rollout.reward", rollout.reward)]
    rewards += [("trainer.callbacks.gold", record.gold) for record in _callbacks(cli, EvaluationRecord) if record.gold]
    for key, reward in rewards:
        with cli.naming(key):
            reward.check()


def _callbacks(cli: "TrainingCLI", kind: type[Callback]) -> list[Any]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
