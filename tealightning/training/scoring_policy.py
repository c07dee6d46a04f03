"""LightningModule that scores rollouts in micro-batches: what training, reference and evaluation share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tealightning.checks import check_integer
from tealightning.reliability.progress import beat
from tealightning.training.micro_batches import split_groups, split_rows, tokens_of_a_pass
from tealightning.training.optimized_policy import OptimizedPolicy
from tealightning.training.policy_weights import gradient_sync, is_sharded
from tealightning.training.scoring import distinct_prompts, score_completions
from tealightning.training.shared_prompts import can_share_prompts
from tealightning.types import RolloutBatch


class ScoringPolicy(OptimizedPolicy):
    """Splits rollouts into micro-batches and scores them, each prompt computed once where the model can do that: the
    base class of `PostTrainingModule`, which documents the arguments."""

    def __init__(
        self,
        *args: Any,
        share_prompts: bool,
        micro_batch_tokens: int | None,
        micro_batch_size: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.share_prompts = share_prompts
        self._micro_batch_tokens = micro_batch_tokens
        self.micro_batch_size = micro_batch_size
        for name, value in (("micro_batch_tokens", micro_batch_tokens), ("micro_batch_size", micro_batch_size)):
            if value is not None:
                check_integer(name, value, 1)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward and backward pass, on the device where the policy is."""
        return self._micro_batch_tokens or tokens_of_a_pass(self.device)

    def shares_prompts(self, model: Any, rollouts: RolloutBatch, *, is_trained: bool = False) -> bool:
        """Whether `model` computes each prompt once; the first time it is tried, also the gradients if it `is_trained`.
        Ranks decide together about a sharded model."""

        def backward(loss: Tensor) -> None:
            with gradient_sync(model, self.trainer.strategy, wanted=is_sharded(model)):
                loss.backward()  # not `manual_backward`: callbacks see the gradients of training only

        def over_ranks(value: float) -> float:
            return float(self.over_ranks({"value": value}, "max")["value"]) if is_sharded(model) else value

        return self.share_prompts and can_share_prompts(
            model,
            rollouts,
            max_tokens=self.micro_batch_tokens,
            backward=backward if is_trained else None,
            over_ranks=over_ranks,
        )

    def micro_batches(self, model: Any, rollouts: RolloutBatch, rows: Tensor, *, share_prompts: bool) -> list[Tensor]:
        """Micro-batches of `rows`. Empty ones follow where the other ranks of a sharded model have more: it is called
        by all of them together or not at all."""
        lengths = (rollouts.prompt_lengths, rollouts.completion_lengths)
        limits: Any = {"max_tokens": self.micro_batch_tokens, "max_rows": self.micro_batch_size}
        if share_prompts and len(rows) > 0:
            splits = split_groups(distinct_prompts(rollouts, rows)[2], *lengths, rows, **limits)
        else:
            splits = split_rows(*lengths, rows, **limits)
        if is_sharded(model):
            calls = int(self.over_ranks({"calls": len(splits)}, "max")["calls"])
            splits += [rows[:0]] * (calls - len(splits))
        return splits

    @torch.no_grad()
    def frozen_log_probs(self, model: Any, rollouts: RolloutBatch, rows: Tensor) -> Tensor:
        """[B, T] log-probs of `rows` without gradient; 0 elsewhere."""
        log_probs = torch.zeros_like(rollouts.rollout_log_probs)
        shares = self.shares_prompts(model, rollouts)
        for chosen in self.micro_batches(model, rollouts, rows, share_prompts=shares):
            scores = score_completions(model, rollouts, some(chosen), share_prompts=shares)
            if len(chosen) > 0:
                log_probs[chosen, : scores.mask.shape[1]] = scores.log_probs.to(log_probs.dtype)
            beat()
        return log_probs

    def over_ranks(self, values: Mapping[str, Tensor | float], op: str) -> dict[str, Tensor]:
        """Reduce named scalars (the same names on every rank) in one collective, to float64 scalars on this device.

        Args:
            op: `sum`, `max`, or `mean`, which fits data parallelism: it averages the ranks' gradients.
        """
        scalars = [torch.as_tensor(value).detach().to(self.device, torch.float64) for value in values.values()]
        return dict(zip(values, self.trainer.strategy.reduce(torch.stack(scalars), reduce_op=op), strict=True))


def some(chosen: Tensor) -> Tensor:
    """The micro-batch, or any rollout in place of none: a model that ranks call together wants an input."""
    return chosen if len(chosen) > 0 else chosen.new_zeros(1)
