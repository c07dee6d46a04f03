"""Skip optimizer steps whose loss or gradient is not finite; count and describe them."""

import warnings
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_only
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
        """A rollout step begins."""
        self.last = None

    def add(self, skipped: SkippedStep) -> None:
        """An optimizer step was skipped, on all ranks.

        Raises:
            UnhealthyRun: after `MOST_IN_A_ROW` without an end.
        """
        self.last = skipped
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row == 1:
            _warn(
                f"An optimizer step was skipped, and weights and optimizer left as they are: {skipped}. "
                "train/nonfinite_steps counts these."
            )
        if self.in_a_row >= MOST_IN_A_ROW:
            raise UnhealthyRun(f"{self.in_a_row} optimizer steps in a row were skipped, the last one with {skipped}.")

    def end(self) -> None:
        """The rollout step is done."""
        if self.last is None:
            self.in_a_row = 0


def unclipped_norm(policy: nn.Module) -> Tensor:
    """Norm of the policy's gradient, before clipping; sharded where the policy is."""
    return torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])


def is_not_finite(sums: Mapping[str, Tensor]) -> Tensor:
    """Scalar float64, 1 where the loss, its KL penalty or the norm of its gradient is NaN or infinite, else 0."""
    values = [sums[key].double() for key in ("policy_loss", "kl", "grad_norm") if key in sums]
    return (~torch.isfinite(torch.stack(values)).all()).double()


def not_finite_gradients(policy: nn.Module) -> list[str]:
    """Names of the parameters whose gradient (of a sharded one: this rank's share) has a NaN or infinity."""
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    shares = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return [name for name, share in shares.items() if not bool(torch.isfinite(share).all())]


def skipped_step(
    sums: Mapping[str, Tensor], policy: nn.Module, inner_epoch: int, advantages: Tensor, policy_log_probs: Tensor
) -> SkippedStep:
    """The description of a step from what it has computed."""
    return SkippedStep(
        inner_epoch=inner_epoch,
        loss=float(sums.get("policy_loss", 0.0)),
        kl=float(sums.get("kl", 0.0)),
        grad_norm=float(sums["grad_norm"]),
        advantages=advantages,
        policy_log_probs=policy_log_probs,
        parameters=not_finite_gradients(policy),
    )


@rank_zero_only
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
