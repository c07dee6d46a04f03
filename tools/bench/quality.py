"""Training until a policy is good enough, on the CPU clock: a curve of best-of-n over seconds, here and in TRL."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import AutoTokenizer

from bench.timing import now
from bench.trl_steps import grpo_config
from tealightning import PostTrainingModule, PromptDataModule, RolloutCallback
from tealightning.estimators import AdvantageEstimator
from tealightning.functional.best_of_n import best_of_n
from tealightning.rollouts import TransformersEngine
from tealightning.types import SamplingConfig
from tealightning.worlds import MazeReward
from tealightning.worlds.policy import sample_completions


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@dataclass(kw_only=True, slots=True)
class Point:
    """An evaluation."""

    step: int
    seconds: float  # of training before it
    value: float  # best-of-n, the mean over held-out mazes


@dataclass(kw_only=True, slots=True)
class Task:
    """What both sides train on and are judged by.

    Args:
        folder: Of a world of mazes.
        max_steps: Optimizer steps at most.
        every: Steps between evaluations.
        until: Ends a run: best-of-n at or above it.
    """

    folder: Path
    prompts: int
    group_size: int
    tokens: int
    max_steps: int
    every: int
    until: float
    n: int
    held_out: int
    on_point: Callable[[Point], None] = lambda point: None
    reward: MazeReward = field(default_factory=MazeReward)

    def evaluate(self, policy: Any) -> float:
        """Best-of-n of `policy`, from the same random numbers each time; nothing of the run changes."""
        rows = read_rows(self.folder / "prompts" / "val.jsonl")[: self.held_out]
        repeated = [row for row in rows for _ in range(self.n)]
        modes = [module for module in policy.modules() if module.training]
        with isolate_rng(), torch.no_grad():
            torch.manual_seed(0)
            policy.eval()
            prompts = [row["prompt"] for row in repeated]
            paths = sample_completions(policy, self.tokenizer(), prompts, max_new_tokens=self.tokens, batch_size=1024)
        for module in modes:
            module.training = True
        rewards = torch.tensor(self.reward.score(prompts, paths, repeated), dtype=torch.float64)
        return float(best_of_n(rewards.view(len(rows), self.n), [self.n]).mean())

    def tokenizer(self) -> Any:
        """The policy's."""
        return AutoTokenizer.from_pretrained(self.folder / "policy")


class Curve:
    """Evaluations of a run, and the seconds between them. A run calls `after_step` and stops when that says so."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.points: list[Point] = []
        self._seconds = 0.0
        self._since = 0.0

    def start(self, policy: Any) -> None:
        """The evaluation before training."""
        self._add(0, policy)

    def after_step(self, step: int, policy: Any) -> bool:
        """Whether the run has ended: it is good enough, or has had its steps."""
        if step % self.task.every == 0:
            self._seconds += now() - self._since
            self._add(step, policy)
        return self.points[-1].value >= self.task.until or step >= self.task.max_steps

    def _add(self, step: int, policy: Any) -> None:
        self.points.append(Point(step=step, seconds=self._seconds, value=self.task.evaluate(policy)))
        self.task.on_point(self.points[-1])
        self._since = now()


def seconds_until(points: Sequence[Point], until: float) -> float | None:
    """Seconds of training before the first evaluation at or above `until`; None = never."""
    return next((point.seconds for point in points if point.value >= until), None)


def over(ours: Sequence[float | None], theirs: Sequence[float | None], budgets: Sequence[float]) -> dict[str, Any]:
    """Mean seconds of ours over theirs; None where ours never got there with a seed. Where TRL never got there its
    whole budget counts in the place of what it would have needed, and the ratio is a bound from above."""
    if any(seconds is None for seconds in ours):
        return {"ratio": None, "is_bound": False}
    spent = [budget if seconds is None else seconds for seconds, budget in zip(theirs, budgets, strict=True)]
    whole = mean(seconds for seconds in ours if seconds is not None)
    return {"ratio": round(whole / mean(spent), 4), "is_bound": any(seconds is None for seconds in theirs)}


# ---------------------------------------------------------------- both sides


def train_here(task: Task, estimator: AdvantageEstimator, *, lr: float, seed: int) -> list[Point]:
    """Training with this package's defaults."""
    curve = Curve(task)

    class Evaluate(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            curve.start(pl_module.policy)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            trainer.should_stop = curve.after_step(trainer.global_step, pl_module.policy)

    pl.seed_everything(seed, verbose=False)
    module = PostTrainingModule(
        str(task.folder / "policy"),
        estimator,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
    )
    sampling = SamplingConfig(max_new_tokens=task.tokens)
    rollout = RolloutCallback(
        TransformersEngine(), task.reward, group_size=task.group_size, sampling=sampling, seed=seed
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=task.max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[rollout, Evaluate()],
    )
    data = PromptDataModule(train=str(task.folder / "prompts" / "train.jsonl"), batch_size=task.prompts, seed=seed)
    trainer.fit(module, datamodule=data)
    return curve.points


def train_in_trl(task: Task, *, lr: float, seed: int) -> list[Point]:
    """TRL's GRPOTrainer with its defaults, the same optimizer settings and one update on each batch."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    curve, steps = Curve(task), count(1)

    class Evaluate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            curve.start(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = curve.after_step(next(steps), kwargs["model"])

    def reward(prompts: list[str], completions: list[str], grid: list[str], **_: Any) -> list[float]:
        return task.reward.score(prompts, completions, [{"grid": each} for each in grid])

    rows = read_rows(task.folder / "prompts" / "train.jsonl")
    config = grpo_config(
        per_device_train_batch_size=task.prompts * task.group_size,
        num_generations=task.group_size,
        max_completion_length=task.tokens,
        max_steps=task.max_steps,
        learning_rate=lr,
        weight_decay=0.0,
        seed=seed,
    )
    trainer = GRPOTrainer(
        model=str(task.folder / "policy"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "grid": row["grid"]} for row in rows]),
        processing_class=task.tokenizer(),
        callbacks=[Evaluate()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve.points
