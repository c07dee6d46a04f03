"""Prompt loaders: a seeded order that resumes exactly (training), or every prompt in order (evaluation).

Neither is a `torch.utils.data.DataLoader`: there is nothing to prefetch, and a batch fetched early is lost on resume.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tealightning.data.prompts import PromptSet
from tealightning.errors import UserError
from tealightning.types import PromptBatch


class PromptLoader:
    """Training batches: a stream of seeded permutations, cut into equal steps, that continues where it stands.

    Step k of an epoch is rows `[k * W * batch_size, (k + 1) * W * batch_size)` of the permutation of `(seed, epoch)`,
    and rank r of W takes every W-th of them. So all ranks have equally many full batches, and the prompts of a step do
    not depend on how many ranks share them. What is left of less than a step is dropped, others each epoch.

    Iterating yields one epoch's number of batches from where the stream stands. A pass that was cut short (by
    `limit_train_batches`, or a checkpoint) is continued by the next one: no prompt comes twice before all came once.
    `batch_size` is per rank and step; fewer prompts than one step takes are a ValueError. With `overfit` (Lightning's
    `overfit_batches`: a number, or a share of the epoch) the stream is the first steps of the first epoch, repeated.
    """

    def __init__(
        self,
        prompts: PromptSet,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        overfit: float = 0,
    ) -> None:
        self.prompts = prompts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.prompts_per_step = batch_size * world_size
        """Prompts of one step on all ranks."""
        self.overfit = overfit if isinstance(overfit, int) else math.ceil(overfit * len(self))
        self.steps_served = 0
        """Steps taken from the stream since its start."""
        self._epoch_and_order: tuple[int, NDArray[np.int64]] = -1, np.empty(0, np.int64)
        if len(prompts) < self.prompts_per_step:
            raise UserError(
                f"training takes {self.prompts_per_step} prompts a step (batch_size={batch_size} on each of "
                f"{world_size} ranks) and there are {len(prompts)}: lower batch_size or add prompts."
            )

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.prompts) // self.prompts_per_step

    def __iter__(self) -> Iterator[PromptBatch]:
        for _ in range(len(self)):
            batch = self.peek()
            self.steps_served += 1  # before the yield: a checkpoint written during the step counts it as done
            yield batch

    def peek(self) -> PromptBatch:
        """The batch after the one that was yielded last, which stays the next one."""
        epoch, step = divmod(self.steps_served, len(self))
        if self.overfit:
            epoch, step = 0, self.steps_served % min(self.overfit, len(self))
        if self._epoch_and_order[0] != epoch:
            self._epoch_and_order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        rows = self._epoch_and_order[1][step * self.prompts_per_step :][: self.prompts_per_step]
        return self.prompts.batch(rows[self.rank :: self.world_size])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it is a stream of."""
        return {"steps_served": self.steps_served, "stream": self._stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which must be of a stream of the same prompts, order and number per step."""
        was, now = state["stream"], self._stream
        changed = [f"{key} (was {was.get(key)}, now {now[key]})" for key in now if now[key] != was.get(key)]
        if changed:
            raise UserError(
                f"the checkpoint cannot be resumed with other training prompts: {', '.join(changed)} changed. Restore "
                "the data settings, or start a new run from the checkpoint's weights."
            )
        self.steps_served = int(state["steps_served"])

    @cached_property
    def _stream(self) -> dict[str, Any]:
        return {
            "prompts": len(self.prompts),
            "prompts_per_step": self.prompts_per_step,
            "seed": self.seed,
            "digest of ids": hashlib.sha256("\n".join(self.prompts.ids.to_pylist()).encode()).hexdigest()[:16],
        }


class EvaluationLoader:
    """Evaluation batches: each pass yields every prompt of the split once, in its order.

    Rank r of W takes every W-th prompt, in batches of at most `batch_size` and nearly equal sizes: all ranks have the
    same number of batches, except that with `batch_size=1` some may have one fewer. Every rank must have a prompt.
    """

    def __init__(self, prompts: PromptSet, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if len(prompts) < world_size:
            raise UserError(f"evaluation needs a prompt for each of {world_size} ranks, and there are {len(prompts)}.")
        rows = np.arange(len(prompts))[rank::world_size]
        batches = -(-len(prompts) // (batch_size * world_size))
        self.prompts = prompts
        self._batches = np.array_split(rows, min(batches, len(rows)))

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self.prompts.batch(rows) for rows in self._batches)
