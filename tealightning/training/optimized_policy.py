"""LightningModule of a policy with its optimizer and learning-rate schedule: built, stepped and switched."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from tealightning.errors import UserError
from tealightning.training.optimizers import build_optimizer, has_two_weights, switch_weights, try_optimizer
from tealightning.training.policy_module import PolicyModule
from tealightning.training.schedules import ScheduleEndsError, WarmupSchedule, monitored_key, try_schedule

EVALUATION_WEIGHTS = "evaluation_weights"
"""Key in a checkpoint: the weights to evaluate, where the optimizer trains others."""


class OptimizedPolicy(PolicyModule):
    """Builds and drives optimizer and schedule: the base class of `PostTrainingModule`, which documents the arguments.

    Where an optimizer has methods `train` and `eval` (schedule-free ones), training samples from and steps the weights
    of `train`; validation, export and the end of training take those of `eval`. A checkpoint holds both.
    """

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    inner_epochs: int

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._trainer is not None:
            self.try_schedule(self.try_optimizer(), has_data=True)
        super().setup(stage)

    # ---------------------------------------------------------------- tried and built

    def try_optimizer(self) -> Optimizer:
        """Refuse an optimizer that training could not use; otherwise that of a small layer, after a step."""
        strategy = self.trainer.strategy
        # A launcher that forks forbids CUDA before it has.
        forks = getattr(strategy.launcher, "is_interactive_compatible", False)
        with torch.random.fork_rng(devices=[]):
            return try_optimizer(
                self.optimizer, torch.device("cpu") if forks else strategy.root_device, self.device_mesh
            )

    def try_schedule(self, optimizer: Optimizer, *, has_data: bool = False) -> Any:
        """Refuse a schedule that does not reach the end of the run; otherwise one that has made a few steps. Where
        epochs may end a run before `max_steps` does, its end is known once there are data."""
        if self.lr_scheduler is None:
            return None
        ends_by_steps = self.trainer.max_epochs == -1
        steps = self._rollout_steps(self.trainer.max_steps)
        try:
            known = steps if ends_by_steps or steps < math.inf else None
            return try_schedule(self.lr_scheduler, optimizer, known)
        except ScheduleEndsError:
            if ends_by_steps:
                raise
            steps = self._run_steps() if has_data else 1
            return try_schedule(self.lr_scheduler, self.try_optimizer(), steps)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer, self.policy)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupSchedule):
            total = scheduler.begin(self._run_steps())
            rank_zero_info(f"The schedule of the learning rate, {scheduler.name}, ends at rollout step {total}.")
        return [optimizer], [scheduler]

    def _rollout_steps(self, optimizer_steps: float) -> float:
        """Rollout steps with that many optimizer steps; of -1, which is no limit, infinitely many."""
        return math.inf if optimizer_steps == -1 else math.ceil(optimizer_steps / self.inner_epochs)

    def _run_steps(self) -> float:
        """Rollout steps of the run, by its steps or its epochs, whichever ends first."""
        trainer = self.trainer
        _ = trainer.estimated_stepping_batches  # makes the loader, whose length is needed
        by_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.num_training_batches * trainer.max_epochs
        return min(self._rollout_steps(trainer.max_steps), by_epochs)

    # ---------------------------------------------------------------- stepped

    def step_schedule(self) -> None:
        """Step a schedule that goes by rollout steps."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None and monitored_key(scheduler) is None:
            scheduler.step()

    def on_validation_epoch_end(self) -> None:
        """Step a schedule that waits for a metric. Not later, because a checkpoint of this moment has to hold it."""
        super().on_validation_epoch_end()
        if self._trains():
            self.step_on_plateau()

    def step_on_plateau(self) -> None:
        """Step a schedule that waits for a metric: once at an optimizer step, although a run that is resumed may
        validate there again."""
        scheduler: Any = self.lr_schedulers()
        key = None if scheduler is None else monitored_key(scheduler)
        if key is None or getattr(scheduler, "stepped_at", None) == self.trainer.global_step:
            return
        metrics = self.trainer.callback_metrics
        if key not in metrics:
            raise UserError(f"model.lr_scheduler.monitor: {key!r} is not logged. Logged: {', '.join(sorted(metrics))}.")
        scheduler.step(float(metrics[key]))
        scheduler.stepped_at = self.trainer.global_step  # in its state_dict

    def _trains(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    # ---------------------------------------------------------------- two sets of weights

    def _switch_weights(self, mode: str) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            switch_weights(self.optimizers(use_pl_optimizer=False), mode)

    def on_train_start(self) -> None:
        self._switch_weights("train")

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._switch_weights("eval")

    def on_validation_end(self) -> None:  # not on_validation_model_train: Lightning would not restore the modes itself
        self._switch_weights("train")

    def on_train_end(self) -> None:
        self._switch_weights("eval")

    @contextmanager
    def _evaluation_weights(self) -> Iterator[bool]:
        """Have the weights of evaluation inside; whether they are others than now. Those of training come back bit for
        bit, which switching forth and back would not do."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False) if self._trainer and self.trainer.optimizers else None
        if not has_two_weights(optimizer) or not any(g.get("train_mode", True) for g in optimizer.param_groups):
            yield False
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in params]
        optimizer.eval()
        try:
            yield True
        finally:
            optimizer.train()
            with torch.no_grad():
                for p, value in zip(params, kept, strict=True):
                    p.copy_(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        with self._evaluation_weights() as differ:
            if differ:
                own, names = self.state_dict(), checkpoint["state_dict"]
                checkpoint[EVALUATION_WEIGHTS] = {name: own[name].detach().to("cpu", copy=True) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if EVALUATION_WEIGHTS in checkpoint and self.trainer.state.fn != TrainerFn.FITTING:
            checkpoint["state_dict"] = checkpoint[EVALUATION_WEIGHTS]

    def export(self, folder: str) -> None:
        with self._evaluation_weights():
            super().export(folder)
