"""Whole training steps of the real `Trainer`, timed, with other work in between that is not counted."""

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from bench.no_engine import NoEngine, NoReward
from bench.timing import PhaseClock, now
from bench.world import World, write_prompts
from tealightning import PostTrainingModule, PromptDataModule, RolloutCallback
from tealightning.estimators import AdvantageEstimator
from tealightning.rewards import Reward, SequenceClassifierReward
from tealightning.rollouts import RolloutEngine, TransformersEngine, VLLMEngine
from tealightning.types import PromptBatch, SamplingConfig

ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "transformers": TransformersEngine,
    "vllm": lambda: VLLMEngine(kv_cache_gib=1.0),
    "none": NoEngine,
}
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

    variant: str
    whole: float
    phases: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        phases = {phase: self.phases.get(phase, 0.0) for phase in PHASES}
        return {"whole": self.whole} | phases | {"other": self.whole - sum(phases.values())}


Between = Callable[[StepTimes, PromptBatch], None]
"""Work after a step that is not counted."""


@dataclass(kw_only=True, slots=True)
class Variant:
    """What a step is made with; the variants of a run take turns, one a step."""

    name: str
    estimator: AdvantageEstimator
    shape: Shape
    share_prompts: bool = True  # False: the plain pass


class InTurn(PromptDataModule):
    """The prompts of a file in its order, as many a step as the step's variant has."""

    def __init__(self, file: str, sizes: Sequence[int]) -> None:
        super().__init__(train=file)
        self.sizes = sizes

    def train_dataloader(self) -> Any:
        ranks = self._ranks()
        rows = np.arange(len(self.prompt_sets["train"]))
        starts = [0, *accumulate(self.sizes)]
        steps = [rows[start : start + size] for start, size in zip(starts, self.sizes, strict=False)]
        batches = [self.prompt_sets["train"].batch(step[ranks["rank"] :: ranks["world_size"]]) for step in steps]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class StepTimer(Callback):
    """Takes the time from the start of a batch to the start of the next, less the time of `between`; first in the list
    of callbacks, so that the rollouts are part of the step.

    Args:
        clock: Phases of the step, emptied at each start.
        rollout: Gets the shape of each step's variant.
        variants: Take turns.
        warm_up: Steps that are not recorded.
        between: Called after each recorded step with its times and batch.
    """

    def __init__(
        self,
        clock: PhaseClock,
        rollout: RolloutCallback,
        variants: Sequence[Variant],
        *,
        warm_up: int,
        between: Between | None,
    ) -> None:
        self.clock = clock
        self.rollout = rollout
        self.variants = variants
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
        variant = self.variants[trainer.global_step % len(self.variants)]
        pl_module.estimator = variant.estimator
        pl_module.share_prompts = variant.share_prompts
        self.rollout.group_size = variant.shape.group_size
        self.rollout.sampling.max_new_tokens = variant.shape.tokens
        self._current = StepTimes(variant=variant.name, whole=0.0)
        self.clock.take()
        self._started = now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert self._current is not None
        self._current.whole += now() - self._started
        self._current.phases = self.clock.take()
        if self.between is not None and self.warm_up < trainer.global_step < trainer.max_steps:
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
    variants: Sequence[Variant],
    *,
    engine: RolloutEngine,
    repeats: int,
    warm_up: int = 1,
    lr: float = 1e-6,
    between: Between | None = None,
    **trainer: Any,
) -> Run:
    """A run that records `repeats` steps of each variant after `warm_up`, and makes one more step, whose start ends the
    last one."""
    folder = Path(tempfile.mkdtemp(prefix="tealightning-bench-"))
    steps = (warm_up + repeats) * len(variants) + 1
    sizes = [variants[step % len(variants)].shape.prompts for step in range(steps)]
    module = PostTrainingModule(
        policy=world.policy,
        estimator=variants[0].estimator,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    )
    without = isinstance(engine, NoEngine)
    reward: Reward = NoReward() if without else SequenceClassifierReward(world.reward_model)
    sampling = SamplingConfig(max_new_tokens=max(variant.shape.tokens for variant in variants))
    rollout = RolloutCallback(
        engine,
        reward,
        group_size=variants[0].shape.group_size,
        sampling=sampling,
        seed=0,
        max_model_len=world.longest_prompt() + sampling.max_new_tokens,
        max_probe_diff=math.inf if without else None,
    )
    timer = StepTimer(
        _phase_clock(engine, reward, module), rollout, variants, warm_up=warm_up * len(variants), between=between
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": CSVLogger(folder, name=""),  # as a real run, every step
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Run(
        module=module,
        rollout=rollout,
        trainer=pl.Trainer(callbacks=[timer, rollout], **settings | trainer),
        data=InTurn(write_prompts(world, folder / "prompts.jsonl", sizes), sizes),
        timer=timer,
    )


def _phase_clock(engine: RolloutEngine, reward: Reward, module: PostTrainingModule) -> PhaseClock:
    clock = PhaseClock()
    clock.time(engine, "generate", "generate")
    clock.time(engine, "sync_weights", "sync")
    clock.time(reward, "score", "reward")
    clock.time(module, "training_step", "train")
    return clock
