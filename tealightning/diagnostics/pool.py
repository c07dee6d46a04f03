"""Pool of many rollouts per prompt that the instruments measure on."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.types import PromptBatch, RolloutBatch


@dataclass(kw_only=True, slots=True)
class RolloutPool:
    """M rollouts of each of Q prompts, from one policy that did not change meanwhile."""

    ids: list[str]  # Q prompts, unique
    rewards: Tensor  # [Q, M] float64; NaN = could not be scored
    batches: list[RolloutBatch] = field(
        default_factory=list
    )  # each [P_b, M] rewards, in the order of `ids`; on the CPU

    @property
    def valid(self) -> Tensor:
        """[Q, M] bool, True = the reward is a finite number."""
        return torch.isfinite(self.rewards)


def pool_of(batches: Sequence[PromptBatch]) -> RolloutPool:
    """The pool of batches whose rollouts are attached, all with the same number a prompt.

    Raises:
        ValueError: if there is no batch, a batch has no rollouts, or their numbers a prompt differ.
    """
    rollouts = [batch.rollouts.to("cpu") for batch in batches if batch.rollouts is not None]
    sizes = {each.group_size for each in rollouts}
    if not rollouts or len(rollouts) < len(batches) or len(sizes) != 1:
        raise UserError(
            f"a pool takes batches with the same number of rollouts a prompt: got {len(batches)} batches, "
            f"{len(rollouts)} of them with rollouts, {sorted(sizes)} a prompt."
        )
    return RolloutPool(
        ids=[prompt_id for batch in batches for prompt_id in batch.ids],
        rewards=torch.cat([each.rewards.double() for each in rollouts]),
        batches=rollouts,
    )


def write_rewards(path: Path, pool: RolloutPool) -> None:
    """One line a prompt: `{"id": ..., "rewards": [M numbers]}`, null for a rollout that could not be scored."""
    with path.open("w", encoding="utf-8") as file:
        for prompt_id, rewards in zip(pool.ids, pool.rewards.tolist(), strict=True):
            scored = [reward if math.isfinite(reward) else None for reward in rewards]
            file.write(json.dumps({"id": prompt_id, "rewards": scored}, ensure_ascii=False) + "\n")
