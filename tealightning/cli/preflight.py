"""Check a whole run before anything is loaded: settings against each other, then what is on the disk.

What one class can tell about its own arguments its constructor has refused already.
"""

import inspect
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace

from tealightning.callbacks import EvaluationRecord, RolloutCallback
from tealightning.data import PromptDataModule
from tealightning.data.sources import check_source
from tealightning.errors import UserError
from tealightning.pretrained import check_weights, policy_config, positions_of
from tealightning.training.module import PostTrainingModule
from tealightning.types import Split

if TYPE_CHECKING:
    from tealightning.cli.training import TrainingCLI

PHASES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""What a command reads of the data; the first of them it must have."""


def check_seed(seed: Any) -> None:
    """
    Raises:
        UserError: for a seed that random number generators do not take.
    """
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}.")


def check_classes(settings: Any, key: str = "") -> None:
    """That every `class_path` is one: where a callable is taken, jsonargparse would call a function, whatever it does.

    Raises:
        UserError: naming the setting of the first that is not.
    """
    if isinstance(settings, list):
        for item in settings:
            check_classes(item, key)
    if not isinstance(settings, (dict, Namespace)):
        return
    path = settings.get("class_path")
    if isinstance(path, str) and not _is_class(path):
        raise UserError(f"{key}: {path} is not a class. `class_path` takes classes only.")
    for name in vars(settings) if isinstance(settings, Namespace) else settings:
        check_classes(settings[name], key if name == "init_args" else f"{key}.{name}".lstrip("."))


def _is_class(path: str) -> bool:
    try:
        return inspect.isclass(pkgutil.resolve_name(path))
    except (ImportError, AttributeError, ValueError):
        return False


def check_together(cli: "TrainingCLI") -> None:
    """Settings of different sections against each other. It reads no file.

    Raises:
        UserError: naming the settings that do not go together.
    """
    command, trainer, model, data = str(cli.subcommand), cli.trainer, cli.model, cli.datamodule
    rollout = rollout_of(trainer)
    if command == "fit":
        with cli.naming("rollout.group_size"):
            model.estimator.check_group_size(rollout.group_size)
        with cli.naming("rollout"):
            rollout.check(command, model)
        _check_training(cli)
    _check_trainer(cli.resolved.trainer)
    _check_lengths(rollout)
    _check_samples(trainer, max(model.ns))
    if isinstance(data, PromptDataModule) and data.sources[PHASES[command][0]] is None:
        raise UserError(f"data.{PHASES[command][0]} is not set: give it a file or a data set of the hub.")


def check_inputs(cli: "TrainingCLI") -> None:
    """That what the run reads is there and of the right kind: prompts, policy, reference, reward, checkpoint.

    Raises:
        UserError: naming the setting, and the file or folder.
    """
    command, trainer, model, data = str(cli.subcommand), cli.trainer, cli.model, cli.datamodule
    rollout = rollout_of(trainer)
    if isinstance(data, PromptDataModule):
        for phase in PHASES[command]:
            with cli.naming(f"data.{phase}"):
                if (source := data.sources[phase]) is not None:
                    check_source(source)
    _check_checkpoint(cli.resolved.get("ckpt_path"))
    if isinstance(model, PostTrainingModule):
        _check_policy(cli, model)
        _check_positions(rollout, positions_of(model.policy_config))
    with cli.naming("rollout.engine"):
        rollout.engine.check()
    for key, reward in _rewards(trainer):
        with cli.naming(key):
            reward.check()


def rollout_of(trainer: pl.Trainer) -> RolloutCallback:
    """The trainer's rollout callback."""
    return next(c for c in trainer.callbacks if isinstance(c, RolloutCallback))  # type: ignore[attr-defined]


def _check_trainer(settings: Any) -> None:
    """What Lightning takes without a word, and fails on in the middle of a run."""
    if settings.val_check_interval == 0:
        raise UserError(
            "trainer.val_check_interval must be at least 1 step or a share of an epoch in (0, 1], got 0; without "
            "validation: trainer.limit_val_batches=0."
        )
    for name, least in (("log_every_n_steps", 0), ("num_sanity_val_steps", -1)):
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"trainer.{name} must be at least {least}, got {value}.")


def _check_lengths(rollout: RolloutCallback) -> None:
    new, longest = rollout.sampling.max_new_tokens, rollout.max_model_len
    if longest is not None and new >= longest:
        raise UserError(
            f"rollout.sampling.max_new_tokens={new} leaves no room for a prompt in rollout.max_model_len={longest}: it "
            f"must be at most {longest - 1}, or max_model_len larger."
        )


def _check_samples(trainer: pl.Trainer, samples: int) -> None:
    """No callback may be told to use more samples of a prompt than an evaluation takes; its defaults take what is
    there."""
    defaults = inspect.signature(EvaluationRecord).parameters
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, EvaluationRecord):
            continue
        for name in ("kl_samples", "diversity_samples"):
            if getattr(callback, name) not in (*range(max(samples, 2) + 1), defaults[name].default):
                raise UserError(
                    f"trainer.callbacks.{name} must be at most max(model.ns)={samples}, the samples that an evaluation "
                    f"takes of a prompt, got {getattr(callback, name)}."
                )


def _check_training(cli: "TrainingCLI") -> None:
    settings, model = cli.resolved.trainer, cli.model
    if settings.gradient_clip_val:
        raise UserError(
            "trainer.gradient_clip_val: automatic gradient clipping is not supported for manual optimization. Set "
            "model.gradient_clip_norm instead."
        )
    if settings.accumulate_grad_batches != 1:
        raise UserError(
            "trainer.accumulate_grad_batches: gradient accumulation is not supported in manual optimization. "
            "data.batch_size sets the prompts of a step, and model.micro_batch_tokens what is computed at a time."
        )
    # As asked for, whatever Lightning makes of it on this device: clipping would take scaled gradients for real ones.
    if str(settings.precision) in ("16", "16-mixed"):
        raise UserError("trainer.precision=16-mixed is not supported: use bf16-mixed, bf16-true or 32-true.")
    if not isinstance(model, PostTrainingModule):
        return
    with cli.naming("model.optimizer"):
        optimizer: Any = model.optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        for name, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, got {value}.")
    if model.lr_scheduler is not None:
        with cli.naming("model.lr_scheduler"):
            model.lr_scheduler(optimizer)


def _check_policy(cli: "TrainingCLI", model: PostTrainingModule) -> None:
    settings = {"trust_remote_code": model.load_kwargs["trust_remote_code"]}
    with cli.naming("model.policy"):
        check_weights(model.policy_path)
        _ = model.policy_config
        _ = model.tokenizer
    if cli.subcommand == "fit" and model.loss.kl_coef > 0 and model.reference_path != model.policy_path:
        with cli.naming("model.reference"):
            policy_config(model.reference_path, argument="reference", **settings)
            check_weights(model.reference_path, argument="reference")


def _check_positions(rollout: RolloutCallback, positions: int | None) -> None:
    if positions is None:
        return
    if rollout.max_model_len is not None and rollout.max_model_len > positions:
        raise UserError(
            f"rollout.max_model_len must be at most {positions}, which is max_position_embeddings of the policy, "
            f"got {rollout.max_model_len}."
        )
    if rollout.sampling.max_new_tokens >= positions:
        raise UserError(
            f"rollout.sampling.max_new_tokens must be below {positions}, the positions of the policy for prompt and "
            f"completion, got {rollout.sampling.max_new_tokens}."
        )


def _check_checkpoint(path: Any) -> None:
    """A keyword of Lightning's (`last`, `best`) or a url is looked up later."""
    is_path = (
        isinstance(path, str | Path) and ("/" in str(path) or str(path).endswith(".ckpt")) and "://" not in str(path)
    )
    if is_path and not Path(path).expanduser().exists():
        raise UserError(f"ckpt_path: there is no file {Path(path).expanduser().absolute()}.")


def _rewards(trainer: pl.Trainer) -> Iterator[tuple[str, Any]]:
    yield "rollout.reward", rollout_of(trainer).reward
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EvaluationRecord) and callback.gold is not None:
            yield "trainer.callbacks.gold", callback.gold
