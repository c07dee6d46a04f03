"""Base of metrics over prompts: samples by prompt, over updates and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PromptSamples(Metric):
    """Collect all scored samples. Those of a prompt that arrive in several updates, or on several ranks, are pooled by
    key; without keys every row is a prompt of its own.

    Example:
        >>> class Spread(PromptSamples):
        ...     def compute(self):
        ...         return self.pooled()[1].std(dim=1)
        >>> spread = Spread()
        >>> spread.update(torch.tensor([[0.0, 2.0]]), keys=torch.tensor([7]))
        >>> spread.update(torch.tensor([[4.0]]), keys=torch.tensor([7]))
        >>> spread.compute()
        tensor(2., dtype=torch.float64)
    """

    full_state_update = False

    rewards: list[Tensor]  # each [samples] float64, all scored samples, prompt after prompt
    counts: list[Tensor]  # each [P] int64, samples of each prompt
    keys: list[Tensor]  # each [P] int64, or nothing at all where no keys are given

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("rewards", "counts", "keys"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, valid: Tensor | None = None, keys: Tensor | None = None) -> None:
        """Add the samples [P, M] of some prompts; those that are not finite or not `valid` are left out.

        `keys` [P] int64 tell which prompt each row belongs to: give them always or never. M may differ between calls.
        """
        if rewards.ndim != 2:
            raise ValueError(f"rewards must have shape [P, M], got {tuple(rewards.shape)}.")
        for name, tensor, shape in (("valid", valid, rewards.shape), ("keys", keys, rewards.shape[:1])):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        scored = torch.isfinite(rewards) if valid is None else torch.isfinite(rewards) & valid.bool()
        self.rewards.append(rewards.detach()[scored].double())
        self.counts.append(scored.sum(dim=1))
        self.keys.append(scored.new_empty(0, dtype=torch.int64) if keys is None else keys.long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather from all ranks; a rank without updates takes part with empty tensors of the right dtype."""
        if isinstance(self.rewards, list) and not self.rewards:  # a tensor: gathered already, for `compute`
            PromptSamples.update(self, torch.empty(0, 0, device=self.device))  # not counted as an update
        super().sync(*args, **kwargs)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Sorted keys [Q] int64 and the scored samples of each [Q, M] float64, padded with NaN; the same on all ranks.

        Without keys they count the prompts in order of arrival, rank after rank. Every rank must call it.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=not self._is_synced,
            should_unsync=not self._is_synced,
            distributed_available=self.distributed_available_fn,
        ):
            return self._pooled()

    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Sorted keys [Q] and the samples of each prompt, [Q, M] padded with NaN."""
        rewards, counts, keys = (_concatenated(state, self.device) for state in (self.rewards, self.counts, self.keys))
        if keys.numel() == 0:
            keys = torch.arange(counts.numel(), device=counts.device)
        if keys.numel() != counts.numel():
            raise ValueError(
                f"keys were given for {keys.numel()} of {counts.numel()} prompts; give them always or never."
            )
        keys, row = keys.long().unique(return_inverse=True)
        owner, order = row.repeat_interleave(counts.long()).sort(stable=True)
        totals = owner.bincount(minlength=keys.numel())
        position = torch.arange(owner.numel(), device=owner.device) - (totals.cumsum(0) - totals)[owner]
        width = max(int(totals.max()) if totals.numel() else 0, 1)
        samples = torch.full((keys.numel(), width), float("nan"), dtype=torch.float64, device=rewards.device)
        samples[owner, position] = rewards.double()[order]
        return keys, samples


def _concatenated(state: list[Tensor] | Tensor, device: torch.device) -> Tensor:
    """A list state as one tensor: synced states already are, and nothing is an empty one."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.empty(0, dtype=torch.int64, device=device)
