"""Whole training steps of the real `Trainer`, timed, with other work in between that is not counted."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from bench.timing import PhaseClock, now
from bench.world import World, write_prompts
from tealightning import PostTrainingModule, PromptDataModule, RolloutCallback
from tealightning.data.loader import EvaluationLoader
from tealightning.estimators import AdvantageEstimator
from tealightning.rewards import SequenceClassifierReward
from tealightning.rollouts import RolloutEngine, TransformersEngine, VLLMEngine
from tealightning.types import PromptBatch, SamplingConfig

ENGINES = {"transformers": TransformersEngine, "vllm": VLLMEngine}
PHASES = ("generate", "reward", "sync", "train")


@dataclass(kw_only=True, slots=True)
class Shape:
    """P prompts a step, m rollouts a prompt, T tokens a rollout."""

    prompts: int = 8
    group_size: int = 16
    tokens: int = 64


@dataclass(kw_only=True, slots=True)
class StepTimes:
    """Seconds of one step by phase; `other` is what is in none: the loop, checks, padding, logging."""

    estimator: str
    whole: float
    phases: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        phases = {phase: self.phases.get(phase, 0.0) for phase in PHASES}
        return {"whole": self.whole} | phases | {"other": self.whole - sum(phases.values())}


class InOrder(PromptDataModule):
    """Prompts in the order of the file, so that all steps have the same."""

    def train_dataloader(self) -> Any:
        return EvaluationLoader(self.prompt_sets["train"], batch_size=self.batch_size, **self._ranks())


class StepTimer(Callback):
    """Takes the time from the start of a batch to the start of the next, less the time of `between`; first in the list
    of callbacks, so that the rollouts are part of the step.

    Args:
        clock: Phases of the step, emptied at each start.
        estimators: Take turns, one a step.
        warm_up: Steps that are not recorded.
        between: Called after each recorded step with its times and batch.
    """

    def __init__(
        self,
        clock: PhaseClock,
        estimators: dict[str, AdvantageEstimator],
        *,
        warm_up: int,
        between: Callable[[StepTimes, PromptBatch], None] | None,
    ) -> None:
        self.clock = clock
        self.estimators = list(estimators.items())
        self.warm_up = warm_up
        self.between = between
        self.times: list[StepTimes] = []
        self._current: StepTimes | None = None
        self._started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        ended = now()
        if self._current is not None and trainer.global_step > self.warm_up:
            self._current.whole += ended - self._started
            self.times.append(self._current)
        name, pl_module.estimator = self.estimators[trainer.global_step % len(self.estimators)]
        self._current = StepTimes(estimator=name, whole=0.0)
        self.clock.take()
        self._started = now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert self._current is not None
        self._current.whole += now() - self._started
        self._current.phases = self.clock.take()
        if self.between is not None and trainer.global_step > self.warm_up:
            self.between(self._current, batch)
        self._started = now()


@dataclass(kw_only=True, slots=True)
class Run:
    """Everything of a run of the real trainer."""

    module: PostTrainingModule
    rollout: RolloutCallback
    trainer: pl.Trainer
    data: PromptDataModule
    timer: StepTimer

    def fit(self) -> list[StepTimes]:
        """The recorded steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.fit(self.module, datamodule=self.data)
        return self.timer.times


def build_run(
    world: World,
    shape: Shape,
    *,
    engine: RolloutEngine,
    estimators: dict[str, AdvantageEstimator],
    steps: int,
    warm_up: int = 1,
    lr: float = 1e-6,
    between: Callable[[StepTimes, PromptBatch], None] | None = None,
    callbacks: Sequence[Callback] = (),
    **trainer: Any,
) -> Run:
    """A run that records `steps` steps after `warm_up`, and makes one more, whose start ends the last one."""
    folder = Path(tempfile.mkdtemp(prefix="tealightning-bench-"))
    total = warm_up + steps + 1
    module = PostTrainingModule(
        policy=world.policy,
        estimator=next(iter(estimators.values())),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    )
    reward = SequenceClassifierReward(world.reward_model)
    sampling = SamplingConfig(max_new_tokens=shape.tokens)
    rollout = RolloutCallback(engine, reward, group_size=shape.group_size, sampling=sampling, seed=0)
    clock = PhaseClock()
    clock.time(engine, "generate", "generate")
    clock.time(engine, "sync_weights", "sync")
    clock.time(reward, "score", "reward")
    clock.time(module, "training_step", "train")
    timer = StepTimer(clock, estimators, warm_up=warm_up, between=between)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": total,
        "logger": CSVLogger(folder, name=""),  # what a real run logs, it logs every step
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    data = InOrder(
        train=write_prompts(world, folder / "prompts.jsonl", per_step=shape.prompts, steps=total),
        batch_size=shape.prompts,
    )
    return Run(
        module=module,
        rollout=rollout,
        trainer=pl.Trainer(callbacks=[timer, rollout, *callbacks], **settings | trainer),
        data=data,
        timer=timer,
    )
