"""Random tokens and rewards in the place of an engine and a reward model: what is left of a step is its training."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tealightning.rewards.base import Metadata, Reward
from tealightning.rollouts import RolloutEngine
from tealightning.rollouts.base import EngineContext, TokenIds
from tealightning.types import Completion, Prompt, SamplingConfig


class NoEngine(RolloutEngine):
    """Completions of random tokens, as long as may be."""

    shares_weights = True

    def start(self, context: EngineContext) -> None:
        self._vocabulary = context.policy.get_input_embeddings().num_embeddings

    def generate(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        length = sampling.max_new_tokens
        log_probs = [-1.0] * length

        def group(seed: int) -> list[Completion]:
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(self._vocabulary, (num_samples, length), generator=generator).tolist()
            return [Completion(token_ids=row, log_probs=log_probs, text="", truncated=True) for row in ids]

        return [group(seed) for seed in seeds]

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing is held."""


class NoReward(Reward):
    """Random numbers."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> Tensor:
        return torch.randn(len(completions), dtype=torch.float64)
