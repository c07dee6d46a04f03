"""Probe of an engine's weights: log-probs of a few tokens that it samples, compared with the trainer's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from tealightning.rollouts.base import EngineContext, RolloutEngine
from tealightning.rollouts.collector import check_completions
from tealightning.rollouts.generation_request import padded, prompt_seed
from tealightning.rollouts.transformers import eval_mode
from tealightning.training.scoring import score_through_logits
from tealightning.types import CompletionScores, RolloutBatch, SamplingConfig


@dataclass(kw_only=True, slots=True)
class LogProbDifference:
    """How far engine and trainer are apart on the tokens that the engine sampled, in nats."""

    mean: float  # of the absolute differences
    largest: float


def log_prob_difference(
    engine: RolloutEngine,
    policy: Any,
    context: EngineContext,
    *,
    num_prompts: int = 2,
    prompt_tokens: int = 12,
    new_tokens: int = 4,
    seed: int = 0,
) -> LogProbDifference:
    """Have a started engine sample after prompts of random tokens, and compare its log-probs with those of `policy`.

    Random tokens reach more of a mixture of experts than text does. They are sampled at temperature 1 without top-k and
    top-p, whatever the run samples with: these hide differences. Global random streams and the modes of the policy's
    modules stay as they were; ranks of a sharded policy must call this together.
    """
    new_tokens = max(1, min(new_tokens, context.max_model_len - 1))
    prompts = probe_prompts(context, num_prompts, max(1, min(prompt_tokens, context.max_model_len - new_tokens)), seed)
    sampling = SamplingConfig(max_new_tokens=new_tokens)
    with isolate_rng(include_cuda=context.device.type == "cuda"):
        seeds = [prompt_seed(seed, "probe", 0, str(p)) for p in range(num_prompts)]
        groups = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=seeds)
        check_completions(engine, groups, sampling, num_prompts=num_prompts, vocab_size=_vocabulary(policy))
        completions = [group[0] for group in groups]
        scores = _scores(policy, context, prompts, [completion.token_ids for completion in completions])
    sampled = padded([completion.log_probs for completion in completions], 0.0).to(context.device)
    differences = (scores.log_probs - sampled)[scores.mask].abs()
    return LogProbDifference(mean=float(differences.mean()), largest=float(differences.max()))


def gives_finite_log_probs(policy: Any, context: EngineContext) -> bool:
    """Whether the trainer gets along with its weights as they are, on a prompt of a few random tokens."""
    (prompt,) = probe_prompts(context, 1, min(8, context.max_model_len), seed=0)
    with isolate_rng(include_cuda=context.device.type == "cuda"):
        return bool(_scores(policy, context, [prompt[:-1] or prompt], [prompt[-1:]]).log_probs.isfinite().all())


def probe_prompts(context: EngineContext, num_prompts: int, longest: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens without special ones, from half of `longest` to `longest` tokens long."""
    tokenizer = context.tokenizer
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    size = min(len(tokenizer), _vocabulary(context.policy))
    tokens = [token for token in range(size) if token not in special] or list(range(size))
    generator = random.Random(seed)
    lengths = [longest - p * (longest // 2) // max(1, num_prompts - 1) for p in range(num_prompts)]
    return [generator.choices(tokens, k=length) for length in lengths]


def _vocabulary(policy: Any) -> int:
    return int(policy.get_input_embeddings().weight.shape[0])


def _scores(
    policy: Any, context: EngineContext, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> CompletionScores:
    """The trainer's log-probs of one completion for each prompt, without dropout."""
    rollouts = RolloutBatch(
        prompt_ids=padded(prompts, 0, side="left"),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
        completion_ids=padded(completions, 0),
        completion_lengths=torch.tensor([len(ids) for ids in completions]),
        rollout_log_probs=torch.zeros(len(prompts), 1),
        truncated=torch.zeros(len(prompts), dtype=torch.bool),
        rewards=torch.zeros(len(prompts), 1, dtype=torch.float64),
    ).to(context.device)
    with torch.inference_mode(False), torch.no_grad(), eval_mode(policy):
        return score_through_logits(policy, rollouts, torch.arange(len(prompts), device=context.device))
