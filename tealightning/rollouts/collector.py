"""Collect rollouts: from prompts to a `RolloutBatch` by generating, scoring and padding."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from tealightning.errors import UserError
from tealightning.functional.tail_checks import tied
from tealightning.reliability.progress import Activity, beat, during
from tealightning.rewards.base import Reward, checked_scores, summed_counts
from tealightning.rollouts.base import RolloutEngine
from tealightning.rollouts.generation_request import padded
from tealightning.types import Completion, PromptBatch, RewardScores, RolloutBatch, SamplingConfig


@dataclass(eq=False)
class RolloutCollector:
    """Runs a started engine and a reward that has been set up over a batch of prompts."""

    engine: RolloutEngine
    reward: Reward
    sampling: SamplingConfig
    pad_token_id: int  # beyond the lengths; any id will do, masks come from the lengths
    vocab_size: int | None = None  # upper bound of the token ids, exclusive; None = not checked
    score_as_finished: bool = False  # prompt by prompt, in a thread while others are generated, not all at the end

    def collect(
        self, batch: PromptBatch, *, num_samples: int, seeds: list[int], weights_version: int
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Completions of every prompt with their rewards, on the CPU, and the seconds that each part took.

        `seeds` are P, far apart (see `prompt_seed`); `weights_version` is the number of optimizer steps that the
        engine's weights have seen. A ValueError says that the engine or the reward broke its contract.
        """
        completions, scores, seconds = self._generate_and_score(batch, num_samples, seeds)
        shape = (len(batch), num_samples)
        rollouts = RolloutBatch(
            prompt_ids=padded(batch.token_ids, self.pad_token_id, side="left").repeat_interleave(num_samples, dim=0),
            prompt_lengths=torch.tensor([len(ids) for ids in batch.token_ids for _ in range(num_samples)]),
            completion_ids=padded([completion.token_ids for completion in completions], self.pad_token_id),
            completion_lengths=torch.tensor([len(completion.token_ids) for completion in completions]),
            rollout_log_probs=padded([completion.log_probs for completion in completions], 0.0),
            truncated=torch.tensor([completion.truncated for completion in completions]),
            rewards=scores.total.reshape(shape),
            reward_components={name: values.reshape(shape) for name, values in scores.components.items()},
            reward_counts={f"{name}_{key}": n for name, of in scores.counts.items() for key, n in of.items()},
            completions=[completion.text for completion in completions],
            sampling=self.sampling,
            weights_version=weights_version,
        )
        return rollouts, seconds

    def _generate_and_score(
        self, batch: PromptBatch, num_samples: int, seeds: list[int]
    ) -> tuple[list[Completion], RewardScores, dict[str, float]]:
        """B completions, their scores and the seconds taken; the reward's are those after the last
        completion was generated."""
        started = time.perf_counter()
        groups: dict[int, list[Completion]] = {}
        pending: dict[int, Future[RewardScores]] = {}
        thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        try:
            with during(Activity.GENERATING):
                for p, group in self.engine.generate_each(
                    batch.token_ids, num_samples=num_samples, sampling=self.sampling, seeds=seeds
                ):
                    groups[p] = group
                    beat()
                    if self.score_as_finished:
                        self._check([group], 1, num_samples)
                        pending[p] = thread.submit(self._score, batch, {p: group})
            generated = time.perf_counter()
            grouped = [groups[p] for p in sorted(groups)]
            self._check(grouped, len(batch), num_samples)
            with during(Activity.SCORING):
                parts = [pending[p].result() for p in sorted(pending)]
                parts = parts or [self._score(batch, dict(enumerate(grouped)))]
        finally:  # without waiting: after an error, what is being scored is of no use
            thread.shutdown(wait=False, cancel_futures=True)
        seconds = {"generate": generated - started, "reward": time.perf_counter() - generated}
        return [completion for group in grouped for completion in group], _joined(parts), seconds

    def _score(self, batch: PromptBatch, groups: dict[int, list[Completion]]) -> RewardScores:
        """Scores of the completions of some prompts, which are keyed by their place in the batch."""
        rows = [(p, completion.text) for p, group in groups.items() for completion in group]
        prompts, metadata = [batch.prompts[p] for p, _ in rows], [batch.metadata[p] for p, _ in rows]
        with during(Activity.SCORING):
            return checked_scores(self.reward, prompts, [text for _, text in rows], metadata)

    def _check(self, grouped: Sequence[Sequence[Completion]], num_prompts: int, num_samples: int) -> None:
        check_completions(
            self.engine,
            grouped,
            self.sampling,
            num_prompts=num_prompts,
            num_samples=num_samples,
            vocab_size=self.vocab_size,
        )


def check_completions(
    engine: RolloutEngine,
    grouped: Sequence[Sequence[Completion]],
    sampling: SamplingConfig,
    *,
    num_prompts: int,
    num_samples: int = 1,
    vocab_size: int | None = None,
) -> None:
    """Refuse what breaks an engine's contract: other numbers of completions or tokens, ids that are none, NaN."""
    name = f"rollout engine {engine.name!r}"
    counts = [len(group) for group in grouped]
    if counts != [num_samples] * num_prompts:
        wanted = f"{num_samples} completions for each of {num_prompts} prompts"
        raise UserError(f"{name} must return {wanted}, got {counts}.")
    above = math.inf if vocab_size is None else vocab_size
    for completion in (completion for group in grouped for completion in group):
        ids, log_probs, longest = completion.token_ids, completion.log_probs, sampling.max_new_tokens
        if not 1 <= len(ids) <= longest or len(log_probs) != len(ids):
            raise UserError(
                f"{name} must return 1 to {longest} tokens with a log-prob each, got {len(ids)} tokens and "
                f"{len(log_probs)} log-probs."
            )
        if not all(0 <= token < above for token in ids):
            raise UserError(
                f"{name} returned a token id outside [0, {above}): {min(ids)} to {max(ids)}. Does it serve "
                "another model than the trainer's?"
            )
        if not all(math.isfinite(value) for value in log_probs):
            raise UserError(f"{name} returned a log-prob that is not finite: {log_probs}.")


def rollout_metrics(rollouts: RolloutBatch) -> dict[str, float]:
    """Scalars of a batch of rollouts to log.

    Unscorable rewards are left out; a mean over nothing is NaN, except for the fractions.

    `reward_std` is the mean of the within-prompt standard deviations over prompts with two scored rollouts or more, and
    `zero_variance_groups` the fraction of prompts whose scored rewards are all equal: nothing to learn from.
    `reward_ties` is the fraction of scored rollouts whose reward a different completion of their prompt has too.
    """
    rewards, valid = rollouts.rewards.double(), rollouts.valid
    lengths = rollouts.completion_lengths.double()
    lowest = rewards.masked_fill(~valid, math.inf).amin(dim=1)
    highest = rewards.masked_fill(~valid, -math.inf).amax(dim=1)
    scored = rewards[valid]
    stds = [row[mask].std() for row, mask in zip(rewards, valid, strict=True) if mask.sum() >= 2]
    metrics = {
        "reward_mean": scored.mean(),
        "reward_std": torch.stack(stds).mean() if stds else torch.tensor(math.nan),
        "reward_max": scored.max() if len(scored) else torch.tensor(math.nan),
        "completion_length_mean": lengths.mean(),
        "completion_length_max": lengths.max(),
        "truncated_fraction": rollouts.truncated.double().mean(),
        "unscorable_fraction": 1 - valid.double().mean(),
        "zero_variance_groups": (lowest >= highest).double().mean(),
        "reward_ties": tied(rewards.cpu(), rollouts.completions).sum() / valid.sum().clamp(min=1).cpu(),
    }
    for name, values in rollouts.reward_components.items():
        metrics[f"reward_{name}_mean"] = values[~values.isnan()].double().mean()
    metrics |= {f"reward_{name}": torch.tensor(count) for name, count in rollouts.reward_counts.items()}
    return {name: float(value) for name, value in metrics.items()}


def _joined(parts: Sequence[RewardScores]) -> RewardScores:
    first = parts[0]
    return RewardScores(
        total=torch.cat([part.total for part in parts]),
        components={name: torch.cat([part.components[name] for part in parts]) for name in first.components},
        counts={name: summed_counts(part.counts.get(name, {}) for part in parts) for name in first.counts},
    )
