"""Optimizer steps that are skipped because loss or gradient is not finite: counted, described, and ended at last."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tealightning.types import SkippedStep

MOST_IN_A_ROW = 100
"""Nothing trains for that long: the module gives up, also where no `HealthChecks` callback has ended the run before."""


class UnhealthyRun(RuntimeError):
    """Training was stopped because what it would learn from is wrong. The weights are those of the last good step."""


class SkippedSteps:
    """Counts rollout steps in which an optimizer step was skipped.

    Checkpoints hold the total. How many in a row is not kept: a run that goes on may skip as many in a row as one that
    begins.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self.last: SkippedStep | None = None  # of the rollout step under way, or just done

    def begin(self) -> None:
        """A rollout step begins; one without a skipped step ends a row of them."""
        if self.last is None:
            self.in_a_row = 0
        self.last = None

    def add(
        self, sums: Mapping[str, Tensor], policy: nn.Module, inner_epoch: int, advantages: Tensor, log_probs: Tensor
    ) -> None:
        """An optimizer step was skipped, on all ranks.

        Raises:
            UnhealthyRun: after `MOST_IN_A_ROW` without an end.
        """
        self.last = SkippedStep(
            inner_epoch=inner_epoch,
            loss=float(sums.get("policy_loss", 0.0)),
            kl=float(sums.get("kl", 0.0)),
            grad_norm=float(sums["grad_norm"]),
            advantages=advantages,
            policy_log_probs=log_probs,
            parameters=_not_finite_gradients(policy),
        )
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row == 1:
            rank_zero_warn(
                f"An optimizer step was skipped, and weights and optimizer left as they are: {self.last}. "
                "train/nonfinite_steps counts these."
            )
        if self.in_a_row >= MOST_IN_A_ROW:
            raise UnhealthyRun(f"{self.in_a_row} optimizer steps in a row were skipped, the last one with {self.last}.")


def _not_finite_gradients(policy: nn.Module) -> list[str]:
    """Names of the parameters whose gradient (of a sharded one: this rank's share) has a NaN or infinity."""
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    shares = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return [name for name, share in shares.items() if not bool(torch.isfinite(share).all())]
