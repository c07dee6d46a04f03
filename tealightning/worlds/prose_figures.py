"""The figures of the manifest: how good the two models are and what the reward looks like under the policy."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tealightning.functional.best_of_n import best_of_n
from tealightning.worlds.policy import heldout_loss, sample_completions
from tealightning.worlds.prose_config import ProseConfig
from tealightning.worlds.prose_prompts import Opening, cut_many_openings, cut_openings
from tealightning.worlds.prose_reward_model import Pair, sample_pairs, score_ids
from tealightning.worlds.tokenizer import tokenize

CURVE_NS = (1, 4, 16, 64, 128)


def measure(
    policy: LlamaForCausalLM,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    heldout: Sequence[str],
    config: ProseConfig,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Figures on the `heldout` paragraphs, by name."""
    rng = random.Random(seed)
    openings = cut_openings(heldout, tokenizer, config, rng=rng)
    loss = heldout_loss(policy, tokenizer, heldout, config.sequence_length)
    pairs = sample_pairs(
        cut_many_openings(heldout, tokenizer, config, count=config.heldout_pairs, rng=rng),
        policy,
        tokenizer,
        max_new_tokens=config.completion_tokens,
        seed=seed,
        progress=False,
    )
    rewards = sample_rewards(
        policy, reward_model, tokenizer, openings[: config.curve_prompts], config, progress=progress
    )
    ns = [n for n in CURVE_NS if n <= config.curve_samples]
    curve = best_of_n(rewards, ns).mean(0)
    return {
        "heldout_loss": loss,
        "heldout_perplexity": torch.tensor(loss).exp().item(),
        "reward_pairwise_accuracy": pairwise_accuracy(reward_model, pairs),
        "heldout_pairs": len(pairs),
        **reward_shape(rewards),
        "best_of_n": {str(n): value for n, value in zip(ns, curve.tolist(), strict=True)},
    }


def pairwise_accuracy(reward_model: LlamaForSequenceClassification, pairs: Sequence[Pair]) -> float:
    """Share of the pairs whose real continuation has the higher reward (a tie counts half)."""
    gap = score_ids(reward_model, [p.real for p in pairs]) - score_ids(reward_model, [p.sampled for p in pairs])
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def sample_rewards(
    policy: LlamaForCausalLM,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    openings: Sequence[Opening],
    config: ProseConfig,
    *,
    progress: bool,
) -> Tensor:
    """Rewards [prompts, curve_samples] float64 of the policy's samples at temperature 1."""
    repeated = [o for o in openings for _ in range(config.curve_samples)]
    sampled = sample_completions(
        policy,
        tokenizer,
        [o.prompt_ids for o in repeated],
        max_new_tokens=config.completion_tokens,
        description="Best of n" if progress else None,
    )
    texts = [o.prompt + tokenizer.decode(ids) for o, ids in zip(repeated, sampled, strict=True)]
    return score_ids(reward_model, tokenize(texts, tokenizer)).view(len(openings), config.curve_samples)


def reward_shape(rewards: Tensor) -> dict[str, float]:
    """Mean over all, and standard deviation and skewness within a prompt (averaged over prompts), of [P, M] rewards."""
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    skewness = centred.pow(3).mean(1) / variance.pow(1.5)
    return {
        "reward_mean": rewards.mean().item(),
        "reward_sd_within_prompt": variance.sqrt().mean().item(),
        "reward_skew_within_prompt": skewness.mean().item(),
    }
