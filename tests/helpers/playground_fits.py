"""Training on the tiny playground in this process, with everything real."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from run_records import RunRecord

from tealightning import PostTrainingModule, PromptDataModule, RolloutCallback
from tealightning.estimators import build_estimator
from tealightning.rewards import FunctionReward, SequenceClassifierReward
from tealightning.rewards.base import Reward
from tealightning.rollouts import RolloutEngine, TransformersEngine
from tealightning.types import SamplingConfig


def module_of(playground: Path, *, lr: float = 1e-3, estimator: str = "grpo", **kwargs: Any) -> PostTrainingModule:
    return PostTrainingModule(
        policy=str(playground / "policy"),
        estimator=build_estimator(estimator),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        **{"ns": [1, 4]} | kwargs,
    )


def data_of(playground: Path, **kwargs: Any) -> PromptDataModule:
    sources = {phase: str(playground / "prompts" / f"{phase}.jsonl") for phase in ("train", "val", "test")}
    return PromptDataModule(**sources | {"batch_size": 4} | kwargs)


def rollout_of(
    playground: Path, engine: RolloutEngine | None = None, reward: Reward | Any = None, **kwargs: Any
) -> RolloutCallback:
    """The reward is the playground's reward model, a `Reward`, or a function. An engine with `is_scripted` makes its
    log-probs up, so that no probe of its weights can be right."""
    if reward is None:
        reward = SequenceClassifierReward(str(playground / "reward_model"))
    elif not isinstance(reward, Reward):
        reward = FunctionReward(reward)
    settings = {"group_size": 8, "sampling": SamplingConfig(max_new_tokens=12)} | kwargs
    if getattr(engine, "is_scripted", False):
        settings["max_probe_diff"] = math.inf
    return RolloutCallback(engine or TransformersEngine(), reward, **settings)


def trainer_of(rollout: RolloutCallback, *others: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A quiet trainer on the CPU, with a `RunRecord` as its last callback."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[rollout, *others, RunRecord()], **settings | kwargs)


def record_of(trainer: pl.Trainer) -> RunRecord:
    (record,) = [callback for callback in trainer.callbacks if isinstance(callback, RunRecord)]
    return record


def fit(
    playground: Path,
    *,
    steps: int,
    engine: RolloutEngine | None = None,
    reward: Any = None,
    module: PostTrainingModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    data: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> tuple[pl.Trainer, RunRecord]:
    """Train for `steps` optimizer steps in all; the trainer (its module, metrics) and what it did."""
    built = trainer_of(
        rollout_of(playground, engine, reward, **(rollout or {})), *callbacks, max_steps=steps, **trainer
    )
    built.fit(module or module_of(playground), datamodule=data_of(playground, **(data or {})), ckpt_path=ckpt_path)
    return built, record_of(built)
