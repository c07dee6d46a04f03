"""Build the prose world: policy, reward model and prompts, from the Python installation alone."""

import random
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tealightning.worlds.folder import (
    PROMPT_SPLITS,
    WORLDS,
    Playground,
    best_of_n_curve,
    build_folder,
    stream_seed,
    write_prompts,
)
from tealightning.worlds.policy import (
    llama_config,
    next_token_loss,
    sample_completions,
    tokenize,
    train_policy,
    train_tokenizer,
)
from tealightning.worlds.prose_config import ProseConfig, resolve_config
from tealightning.worlds.prose_reward_model import Pair, sample_pairs, score_ids, train_reward_model
from tealightning.worlds.prose_text import (
    Opening,
    collect_paragraphs,
    cut_many_openings,
    cut_openings,
    split_paragraphs,
)

FORMAT_VERSION = 1
"""Raised with every change of the recipe, so that a world of an older recipe is not taken for a current one."""


def build_prose(
    out: Path | str,
    *,
    seed: int = 0,
    size: Literal["default", "tiny"] | ProseConfig = "default",
    progress: bool = True,
    overwrite: bool = False,
) -> Playground:
    """Build `out` (policy/, reward_model/, prompts/{train,val,test}.jsonl, playground.json), or reuse it.

    Nothing is downloaded. The same seed and configuration give the same bits on the same machine with the same package
    versions. The global random streams and the thread count are left as they were; the folder appears complete or not
    at all.

    Args:
        out: Folder to create. A world of the same configuration and seed there is returned as it is.
        seed: Seed of splits, initial weights, batches and samples.
        size: A preset, or a configuration of your own.
        progress: Show progress bars and print what happens.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` is something else than the world asked for, or `size` is unknown.
    """
    config = resolve_config(size)
    return build_folder(
        out,
        _identity(config, seed),
        lambda folder: _fill(folder, config, seed=seed, progress=progress),
        num_threads=config.num_threads,
        progress=progress,
        overwrite=overwrite,
    )


WORLDS["prose"] = build_prose


def _identity(config: ProseConfig, seed: int) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "seed": seed, "config": asdict(config)}


def _fill(folder: Path, config: ProseConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """Write policy, reward model and prompts; returns what the manifest says of them."""
    splits = split_paragraphs(
        collect_paragraphs(source_files=config.source_files), config, seed=stream_seed(seed, "splits")
    )
    tokenizer = train_tokenizer(splits.corpus, vocab_size=config.vocab_size, max_positions=config.max_positions)
    openings = {
        name: cut_openings(getattr(splits, name), tokenizer, config, rng=random.Random(stream_seed(seed, name)))
        for name in PROMPT_SPLITS
    }
    for split in PROMPT_SPLITS:
        write_prompts(folder, split, ({"prompt": opening.prompt} for opening in openings[split]))

    policy = train_policy(
        splits.corpus,
        tokenizer,
        llama_config(tokenizer, config, layers=config.policy_layers, max_positions=config.max_positions),
        steps=config.policy_steps,
        batch_size=config.policy_batch_size,
        sequence_length=config.sequence_length,
        lr=config.policy_lr,
        muon_lr=config.policy_muon_lr,
        seed=stream_seed(seed, "policy"),
        progress=progress,
    )
    rng = random.Random(stream_seed(seed, "reward openings"))
    pairs = sample_pairs(
        cut_many_openings(splits.reward, tokenizer, config, count=config.reward_pairs, rng=rng),
        policy,
        tokenizer,
        max_new_tokens=config.completion_tokens,
        seed=stream_seed(seed, "pairs"),
        progress=progress,
    )
    reward_model = train_reward_model(
        pairs, policy, tokenizer, config, seed=stream_seed(seed, "reward model"), progress=progress
    )
    figures = _measure(
        policy, reward_model, tokenizer, splits.heldout, config, seed=stream_seed(seed, "figures"), progress=progress
    )
    for model, name in ((policy, "policy"), (reward_model, "reward_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {
        "paragraphs": {f.name: len(getattr(splits, f.name)) for f in fields(splits)},
        "prompts": {split: len(openings[split]) for split in PROMPT_SPLITS},
        "policy_parameters": policy.num_parameters(),
        "reward_model_parameters": reward_model.num_parameters(),
        "figures": figures,
    }


def _measure(
    policy: LlamaForCausalLM,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    heldout: Sequence[str],
    config: ProseConfig,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Figures of the manifest: how good both models are, and the reward of the policy's samples."""
    rng = random.Random(seed)
    openings = cut_openings(heldout, tokenizer, config, rng=rng)
    loss = _heldout_loss(policy, tokenizer, heldout, config.sequence_length)
    pairs = sample_pairs(
        cut_many_openings(heldout, tokenizer, config, count=config.heldout_pairs, rng=rng),
        policy,
        tokenizer,
        max_new_tokens=config.completion_tokens,
        seed=seed,
        progress=False,
    )
    pictured = openings[: config.curve_prompts]
    rewards = _sample_rewards(policy, reward_model, tokenizer, pictured, config, progress=progress)
    return {
        "heldout_loss": loss,
        "heldout_perplexity": torch.tensor(loss).exp().item(),
        "reward_pairwise_accuracy": _pairwise_accuracy(reward_model, pairs),
        "heldout_pairs": len(pairs),
        **_reward_shape(rewards),
        "best_of_n": best_of_n_curve(rewards),
    }


@torch.no_grad()
def _heldout_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, paragraphs: Sequence[str], length: int
) -> float:
    """Mean negative log-likelihood in nats per token of whole paragraphs (cut at `length` tokens), eos included."""
    total, count = 0.0, 0
    for ids in tokenize(paragraphs, tokenizer):
        row = torch.tensor([[*ids, tokenizer.eos_token_id][:length]])
        total += next_token_loss(model, row).item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count


def _pairwise_accuracy(reward_model: LlamaForSequenceClassification, pairs: Sequence[Pair]) -> float:
    """Share of the pairs whose real continuation has the higher reward (a tie counts half)."""
    gap = score_ids(reward_model, [p.real for p in pairs]) - score_ids(reward_model, [p.sampled for p in pairs])
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def _sample_rewards(
    policy: LlamaForCausalLM,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    openings: Sequence[Opening],
    config: ProseConfig,
    *,
    progress: bool,
) -> Tensor:
    """Rewards [prompts, curve_samples] float64 of the policy's samples at temperature 1."""
    prompts = [o.prompt for o in openings for _ in range(config.curve_samples)]
    sampled = sample_completions(
        policy,
        tokenizer,
        prompts,
        max_new_tokens=config.completion_tokens,
        description="Best of n" if progress else None,
    )
    texts = [prompt + completion for prompt, completion in zip(prompts, sampled, strict=True)]
    return score_ids(reward_model, tokenize(texts, tokenizer)).view(len(openings), config.curve_samples)


def _reward_shape(rewards: Tensor) -> dict[str, float]:
    """Mean over all, and standard deviation and skewness within a prompt (averaged over prompts), of [P, M] rewards."""
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    skewness = centred.pow(3).mean(1) / variance.pow(1.5)
    return {
        "reward_mean": rewards.mean().item(),
        "reward_sd_within_prompt": variance.sqrt().mean().item(),
        "reward_skew_within_prompt": skewness.mean().item(),
    }
