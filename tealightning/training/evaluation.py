"""What a module does in validation and test: best-of-n of its rollouts, and how well a tail fits them."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from tealightning.errors import UserError
from tealightning.metrics import BestOfN, TailFit
from tealightning.metrics.best_of_n import check_budgets
from tealightning.types import PromptBatch, RolloutBatch


class BestOfNEvaluation(pl.LightningModule):
    """Validation and test of `PostTrainingModule`.

    Args:
        ns: Best-of-n budgets; `max(ns)` completions are sampled a prompt.
        extrapolate_ns: Budgets beyond `max(ns)`, extrapolated and logged under their own keys.
    """

    def __init__(self, *, ns: Sequence[int], extrapolate_ns: Sequence[int]) -> None:
        super().__init__()
        self.ns = sorted(check_budgets("ns", ns))
        extrapolated = check_budgets("extrapolate_ns", extrapolate_ns, may_be_empty=True)
        if extrapolated and min(extrapolated) <= self.ns[-1]:
            raise UserError(
                f"extrapolate_ns must hold budgets above max(ns)={self.ns[-1]}, up to which they are measured; got "
                f"{list(extrapolate_ns)}."
            )
        self.best_of_n = torch.nn.ModuleDict(
            {phase: BestOfN(ns=self.ns, extrapolate_ns=extrapolate_ns) for phase in ("val", "test")}
        )
        self.tail_fit = torch.nn.ModuleDict({phase: TailFit() for phase in ("val", "test")})

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._update_metrics("val", batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._update_metrics("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _metrics(self, phase: str) -> list[Any]:
        return [self.best_of_n[phase], self.tail_fit[phase]]

    def _update_metrics(self, phase: str, batch: PromptBatch) -> None:
        rollouts = rollouts_of(batch)
        keys = batch.keys.to(rollouts.rewards.device)
        for metric in self._metrics(phase):
            metric.update(rollouts.rewards, rollouts.valid, keys)

    def _log_metrics(self, phase: str) -> None:
        for metric in self._metrics(phase):
            values = {f"{phase}/{key}": value for key, value in metric.compute().items()}
            self.log_dict(values, sync_dist=True)  # the same on all ranks already; says so to Lightning
            metric.reset()


def rollouts_of(batch: PromptBatch) -> RolloutBatch:
    """What the rollout callback attached.

    Raises:
        RuntimeError: if there is no such callback.
    """
    if batch.rollouts is None:
        raise RuntimeError(
            "The batch has no rollouts. Add RolloutCallback to the trainer's callbacks (CLI: section `rollout`)."
        )
    return batch.rollouts
