"""A plug-in for `--import`: an engine with weights of its own, and a callback that lets a run fail at a given moment.

The environment variable FAULT says what happens, as JSON: `{"phase": ..., "step": ..., "rank": ..., "how": ...}`. The
moment is the `phase` of rollout step `step` on `rank` (0); `how` is kill (SIGKILL to itself), raise, or wait (a file
`at_the_moment` is made and the process waits for a signal).
"""

import copy
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from tealightning import RolloutCallback, register
from tealightning.rollouts import RolloutEngine, TransformersEngine


class _Fault:
    """Where the run is, and what is to happen when."""

    def __init__(self) -> None:
        self.plan: dict[str, Any] = json.loads(os.environ.get("FAULT") or "{}")
        self.step = 0
        self.folder = Path()
        self.seen = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """The run is at this moment now."""
        plan, step = self.plan, self.step if step is None else step
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if plan.get("phase") != phase or step != plan["step"] or rank not in (plan.get("rank", 0), plan.get("too")):
            return
        self.seen += 1
        if self.seen != plan.get("time", 1):
            return
        if plan.get("how", "kill") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan["how"] == "raise":
            raise RuntimeError(f"meant to fail in {phase}")
        (self.folder / f"at_the_moment.{rank}").touch()
        time.sleep(plan.get("seconds", 2.0))


FAULT = _Fault()


@register
class CopyingEngine(RolloutEngine):
    """Samples from a copy of the policy that only a sync changes."""

    is_concurrent = True

    def __init__(self) -> None:
        self.engine = TransformersEngine()

    def start(self, context: Any) -> None:
        context.policy = copy.deepcopy(context.policy)
        self.weights = dict(context.policy.named_parameters())
        self.engine.start(context)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.generate(*args, **kwargs)

    def sync_weights(self, weights: Any) -> None:
        for name, weight in weights:
            if name in self.weights:
                self.weights[name].data.copy_(weight)

    def close(self) -> None:
        self.engine.close()


class FaultPlan(Callback):
    """Says where the run is, and writes down what each completed step trained on.

    Args:
        folder: For `steps.<rank>.jsonl`.
    """

    def __init__(self, folder: str) -> None:
        FAULT.folder = self.folder = Path(folder)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _watch_rollouts(next(c for c in trainer.callbacks if isinstance(c, RolloutCallback)))
        _watch_files()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        torch.rand(trainer.global_rank)  # the streams of ranks, seeded alike, differ from here on

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        FAULT.at("epoch")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        FAULT.at("batch")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        FAULT.at("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        FAULT.at("optimizer")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollouts = batch.rollouts
        record = {
            "step": FAULT.step,
            "global_step": trainer.global_step,
            "ids": batch.ids,
            "tokens": [
                ids[:length].tolist()
                for ids, length in zip(rollouts.completion_ids, rollouts.completion_lengths, strict=True)
            ],
            "weights_version": rollouts.weights_version,
            "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
            "spent": float(trainer.callback_metrics["train/total_rollouts"]),
        }
        with (self.folder / f"steps.{trainer.global_rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        FAULT.at("batch end")
        FAULT.step += 1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        FAULT.step = trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def on_validation_batch_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            FAULT.at("validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            record = {"global_step": trainer.global_step, "best_of_4": float(trainer.callback_metrics["val/best_of_4"])}
            with (self.folder / "validations.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _watch_rollouts(rollout: RolloutCallback) -> None:
    """Generation, scoring and sync of whatever engine and reward there are are moments, too."""
    engine, reward = rollout.engine, rollout.reward
    generate, sync_weights, score = engine.generate, engine.sync_weights, reward.score

    def generated(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        FAULT.at("generate")
        return completions

    def scored(*args: Any, **kwargs: Any) -> Any:
        FAULT.at("reward")
        return score(*args, **kwargs)

    def watched(weights: Any) -> Any:
        for index, weight in enumerate(weights):
            if index == 4:
                FAULT.at("sync")
            yield weight

    engine.generate, reward.score = generated, scored  # type: ignore[method-assign]
    engine.sync_weights = lambda weights: sync_weights(watched(weights))  # type: ignore[method-assign]


def _watch_files() -> None:
    """The writing of a checkpoint has moments, too."""
    save, replace = torch.save, os.replace

    def saved(checkpoint: Any, file: Any, **kwargs: Any) -> None:
        save(checkpoint, file, **kwargs)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            return
        if FAULT.plan.get("phase") == "half a checkpoint" and FAULT.plan["step"] == FAULT.step:
            file.truncate(file.tell() // 2)
            file.flush()
        FAULT.at("half a checkpoint")
        FAULT.at("checkpoint")

    def renamed(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            FAULT.at("before the rename")
        replace(source, target)
        if str(target).endswith(".ckpt"):
            FAULT.at("after the rename")

    torch.save, os.replace = saved, renamed
