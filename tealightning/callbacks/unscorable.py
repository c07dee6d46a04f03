"""Stop a run whose completions cannot be scored."""

from typing import Any

import lightning.pytorch as pl
import torch

from tealightning.types import Phase, RolloutBatch


class UnscorableError(RuntimeError):
    """Too large a share of the completions could not be scored."""


class UnscorableGuard:
    """Compares the share of unscorable completions with a limit: in training step by step, in evaluation over what the
    evaluation has had so far, since its last batch may be a single prompt. All ranks decide alike.

    Args:
        max_share: Largest share in [0, 1] with which a run goes on; 1 = any.

    Raises:
        ValueError: if `max_share` is outside [0, 1].
    """

    def __init__(self, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"rollout.max_unscorable must be a share in [0, 1], got {max_share}.")
        self.max_share = max_share
        self._so_far = torch.zeros(2, dtype=torch.float64)  # unscorable and all completions of an evaluation

    def begin_evaluation(self) -> None:
        """Forget the evaluation before."""
        self._so_far.zero_()

    def check(self, trainer: pl.Trainer, rollouts: RolloutBatch, phase: Phase, problem: str | None) -> None:
        """Count a batch of one rank.

        Args:
            trainer: Reduces over the ranks.
            rollouts: What was scored.
            phase: Of the run.
            problem: What the reward says about it.

        Raises:
            UnscorableError: on every rank, if the share over all ranks is above the limit.
        """
        counts = torch.tensor([(~rollouts.valid).sum(), rollouts.valid.numel()], dtype=torch.float64)
        counts = _summed(trainer, counts)
        if phase != "train":
            counts = self._so_far = self._so_far + counts
        unscorable, total = counts.tolist()
        if unscorable > self.max_share * total:
            where = "a training step" if phase == "train" else f"this evaluation ({phase})"
            raise UnscorableError(
                f"{unscorable:.0f} of the {total:.0f} completions of {where} could not be scored, more than the share "
                f"of {self.max_share:g} that rollout.max_unscorable allows. "
                f"{'The reward gave no reason' if problem is None else f'The reward says: {problem}'}. Once that is "
                "mended, the run can be resumed from its last checkpoint."
            )


def _summed(trainer: Any, counts: torch.Tensor) -> torch.Tensor:
    if trainer.world_size == 1:
        return counts
    return trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum").cpu()
