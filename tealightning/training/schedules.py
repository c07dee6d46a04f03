"""Learning-rate schedules: transformers' by name, on a plateau of a metric, and any of torch, tried at the start."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau

from tealightning.checks import check_choice, check_integer
from tealightning.errors import UserError

__all__ = ["ReduceLROnPlateau", "WarmupSchedule"]

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
"""transformers' schedules (`SchedulerType`) without the two that follow a metric: see `ReduceLROnPlateau`."""
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
_MOST_STEPS_TRIED = 20_000


class ScheduleEndsError(UserError):
    """A schedule works at first, and not for as many steps as asked for."""


class WarmupSchedule(LambdaLR):
    """A linear warm-up and a decay that ends with the run: transformers' schedules, by name.

    Args:
        optimizer: Whose learning rates are scheduled.
        name: As in `transformers.get_scheduler`: `cosine`, `linear`, `constant_with_warmup`, `warmup_stable_decay`...
        warmup_steps: Rollout steps of the warm-up.
        warmup_ratio: The same as a share of all steps.
        total_steps: Rollout steps of the whole schedule; None = of the run: what `trainer.max_steps` and
            `trainer.max_epochs` allow.
        settings: Arguments of this schedule alone: `{min_lr_rate: 0.1}` of `cosine_with_min_lr`, `{num_decay_steps:
            20}` of `warmup_stable_decay`, `{num_cycles: 2}`, `{power: 2.0}`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: ScheduleName,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        total_steps: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        check_choice("name", name, SCHEDULES)
        check_integer("warmup_steps", warmup_steps, 0)
        if not 0 <= warmup_ratio <= 1 or (warmup_ratio and warmup_steps):
            raise UserError(f"warmup_ratio must be from 0 to 1, and 0 with warmup_steps, got {warmup_ratio}.")
        if total_steps is not None:
            check_integer("total_steps", total_steps, 1)
        self.name = name
        self.warmup = (warmup_steps, warmup_ratio)
        self.total_steps = total_steps
        self.settings = settings or {}
        super().__init__(optimizer, lambda step: 1.0)

    def begin(self, run_steps: float) -> int:
        """Start the schedule in a run of `run_steps` rollout steps (infinity = unknown); its own number of steps."""
        from transformers import get_scheduler

        total = self.total_steps or run_steps
        if math.isinf(total):
            raise UserError("the end of the schedule is unknown: set trainer.max_steps or total_steps.")
        steps, ratio = self.warmup
        warmup = steps or math.ceil(ratio * total)
        if warmup > total:
            raise UserError(f"warmup_steps={warmup} is more than the {total} rollout steps of the schedule.")
        sizes: Any = {"num_warmup_steps": warmup, "num_training_steps": int(total)}
        try:
            own = get_scheduler(self.name, self.optimizer, **sizes, scheduler_specific_kwargs=self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"settings of the schedule {self.name}: {error}") from error
        self.lr_lambdas, self._last_lr = own.lr_lambdas, own.get_last_lr()
        return int(total)


def monitored_key(scheduler: Any) -> str | None:
    """The metric that a schedule waits for; None if it goes by steps."""
    if not isinstance(scheduler, TorchReduceLROnPlateau):
        return None
    if not isinstance(key := getattr(scheduler, "monitor", None), str):
        raise UserError(
            "ReduceLROnPlateau needs `monitor`, the key of the metric that it waits for: use "
            "lightning.pytorch.cli.ReduceLROnPlateau, which takes it, in place of torch's."
        )
    return key


def try_schedule(make: Callable[[Optimizer], Any], optimizer: Optimizer, run_steps: float | None) -> Any:
    """Refuse a schedule that does not work: made for an optimizer, and stepped as often as the run does, up to 20,000
    times; None = the number is not known yet. Otherwise the schedule after these steps."""
    try:
        scheduler = make(optimizer)
    except NotImplementedError as error:
        raise UserError(
            "LRScheduler is the base class of schedules: give one of them, such as CosineAnnealingLR."
        ) from error
    name = type(scheduler).__name__
    for method in ("step", "state_dict", "load_state_dict"):
        if not hasattr(scheduler, method):
            raise UserError(f"{name} is no schedule of learning rates: it has no method {method}.")
    is_monitor = monitored_key(scheduler) is not None
    if isinstance(scheduler, WarmupSchedule) and run_steps is not None:
        scheduler.begin(run_steps)
    optimizer.step()
    for step in range(1, int(min(run_steps or 1, _MOST_STEPS_TRIED)) + 1):
        try:
            scheduler.step(0.0) if is_monitor else scheduler.step()
        except Exception as error:  # whatever a class of any origin raises: it would end the run at the same place
            refused = UserError if step == 1 else ScheduleEndsError
            raise refused(f"{name} fails at step {step} ({type(error).__name__}: {error}).") from error
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(math.isfinite(rate) for rate in rates):
            raise UserError(f"{name} gives the learning rate {rates[0]} at step {step}.")
    scheduler.load_state_dict(scheduler.state_dict())
    return scheduler
