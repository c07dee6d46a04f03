"""Build the prose world: policy, reward model and prompts, from the Python installation alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM as Policy
from transformers import LlamaForSequenceClassification as RewardModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from tealightning.worlds import folder as worlds
from tealightning.worlds import policy as lm
from tealightning.worlds import prose
from tealightning.worlds.prose import Opening, ProseConfig

RECIPE = {"format_version": 1}


def build_prose(
    out: Path | str,
    *,
    seed: int = 0,
    size: Literal["default", "tiny"] | ProseConfig = "default",
    progress: bool = True,
    overwrite: bool = False,
) -> worlds.Playground:
    """Build `out` (policy/, reward_model/, prompts/{train,val,test}.jsonl, playground.json), or reuse it.

    The same seed and configuration give the same bits on the same machine with the same package versions. The global
    random streams and the thread count are left as they were; the folder appears complete or not at all.

    Args:
        out: Folder to create. A world of the same configuration and seed there is returned as it is.
        seed: What all random numbers follow from.
        size: A preset, or a configuration of your own.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` is something else than the world asked for, or `size` is unknown.
    """
    config = prose.prose_config(size)
    return worlds.build_folder(out, RECIPE, config, _fill, seed=seed, progress=progress, overwrite=overwrite)


worlds.WORLDS["prose"] = build_prose


def _fill(folder: Path, config: ProseConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """Write policy, reward model and prompts; returns what the manifest says of them."""
    seed_of = partial(worlds.stream_seed, seed)
    paragraphs = prose.collect_paragraphs(source_files=config.source_files)
    splits = prose.split_paragraphs(paragraphs, config, seed=seed_of("splits"))
    tokenizer = lm.train_tokenizer(splits["corpus"], vocab_size=config.vocab_size, max_positions=config.max_positions)
    prompts = {}
    for split in worlds.PROMPT_SPLITS:
        openings = prose.cut_openings(splits[split], tokenizer, config, rng=random.Random(seed_of(split)))
        prompts[split] = worlds.write_prompts(folder, split, ({"prompt": opening.prompt} for opening in openings))
    policy = lm.train_policy(
        splits["corpus"],
        tokenizer,
        lm.llama_config(tokenizer, config, layers=config.policy_layers, max_positions=config.max_positions),
        steps=config.policy_steps,
        batch_size=config.policy_batch_size,
        sequence_length=config.sequence_length,
        lr=config.policy_lr,
        muon_lr=config.policy_muon_lr,
        seed=seed_of("policy"),
        progress=progress,
    )
    rng = random.Random(seed_of("reward openings"))
    openings = prose.cut_many_openings(splits["reward"], tokenizer, config, count=config.reward_pairs, rng=rng)
    pairs = _sample_pairs(openings, policy, tokenizer, config, seed=seed_of("pairs"), progress=progress)
    reward_model = _train_reward_model(
        pairs, policy, tokenizer, config, seed=seed_of("reward model"), progress=progress
    )
    figures = _measure(
        policy, reward_model, tokenizer, splits["heldout"], config, seed=seed_of("figures"), progress=progress
    )
    for model, name in ((policy, "policy"), (reward_model, "reward_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {
        "paragraphs": {name: len(part) for name, part in splits.items()},
        "prompts": prompts,
        "policy_parameters": policy.num_parameters(),
        "reward_model_parameters": reward_model.num_parameters(),
        "figures": figures,
    }


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two continuations of one prompt, as the reward model reads them: prompt + continuation, tokenized as one text."""

    prompt_length: int  # tokens that both start with
    real: list[int]
    sampled: list[int]


def _sample_pairs(
    openings: list[Opening], policy: Policy, tokenizer: Tokenizer, config: ProseConfig, *, seed: int, progress: bool
) -> list[Pair]:
    """One pair per opening."""
    torch.manual_seed(seed)
    prompts = [opening.prompt for opening in openings]
    sampled = _sample_ids(prompts, policy, tokenizer, config, description="Pairs" if progress else None)
    return [
        Pair(prompt_length=len(o.prompt_ids), real=o.prompt_ids + o.continuation_ids, sampled=ids)
        for o, ids in zip(openings, sampled, strict=True)
    ]


def _sample_ids(
    prompts: Sequence[str], policy: Policy, tokenizer: Tokenizer, config: ProseConfig, *, description: str | None
) -> list[list[int]]:
    """Token ids of each prompt and a completion at temperature 1, tokenized as one text."""
    sampled = lm.sample_completions(
        policy, tokenizer, prompts, max_new_tokens=config.completion_tokens, description=description
    )
    return lm.tokenize([prompt + text for prompt, text in zip(prompts, sampled, strict=True)], tokenizer)


def _train_reward_model(
    pairs: Sequence[Pair], policy: Policy, tokenizer: Tokenizer, config: ProseConfig, *, seed: int, progress: bool
) -> RewardModel:
    """Train by Bradley-Terry on every prefix of the continuations, from the policy's embeddings and first layers under
    a zero scalar head.

        loss = -mean_t log sigmoid(r_t(real) - r_t(sampled))

    over the positions `t` after the prompt, `r_t` the score of the text up to `t` or up to its end, whichever comes
    first: one pair teaches as often as it has tokens, and the reward at the last token adds up evidence from the whole
    continuation.
    """
    torch.manual_seed(seed)
    architecture = lm.llama_config(tokenizer, config, layers=config.reward_layers, max_positions=config.max_positions)
    architecture.num_labels = 1
    model = RewardModel(architecture)
    model.model.load_state_dict(policy.model.state_dict(), strict=False)  # the policy has more layers
    torch.nn.init.zeros_(model.score.weight)
    rng = random.Random(seed)
    return lm.train(
        model,
        lambda _: _bradley_terry(model, rng.sample(pairs, config.reward_batch_size), tokenizer.pad_token_id),
        steps=config.reward_steps,
        adamw_lr=config.reward_lr,
        muon_lr=config.reward_muon_lr,
        weight_decay=config.reward_weight_decay,
        description="Reward model" if progress else None,
    )


def _bradley_terry(model: RewardModel, pairs: Sequence[Pair], pad: int) -> Tensor:
    ids, lengths = _right_pad([p.real for p in pairs] + [p.sampled for p in pairs], pad)
    # Causal attention: padding on the right cannot reach the positions that count, so no mask is needed.
    scores = model.score(model.model(input_ids=ids, use_cache=False).last_hidden_state).squeeze(-1)
    positions = torch.arange(ids.shape[1])
    real, sampled = scores.gather(1, torch.minimum(positions, lengths[:, None] - 1)).chunk(2)
    first = torch.tensor([p.prompt_length for p in pairs])
    longest = torch.maximum(*lengths.chunk(2))
    counts = (positions >= first[:, None]) & (positions < longest[:, None])
    return -F.logsigmoid(real - sampled)[counts].mean()


def _right_pad(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] int64 and lengths [B]."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


@torch.no_grad()
def _score(model: RewardModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Rewards [B] float64 of token sequences, through the model's own pooling (last token that is no padding)."""
    scores = []
    for start in range(0, len(sequences), 256):
        ids, lengths = _right_pad(sequences[start : start + 256], model.config.pad_token_id)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        scores.append(model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].double())
    return torch.cat(scores)


def _measure(
    policy: Policy,
    reward_model: RewardModel,
    tokenizer: Tokenizer,
    heldout: Sequence[str],
    config: ProseConfig,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Figures of the manifest: how good both models are, and the reward of the policy's samples (its moments within a
    prompt averaged over prompts)."""
    rng = random.Random(seed)
    prompts = [o.prompt for o in prose.cut_openings(heldout, tokenizer, config, rng=rng)[: config.curve_prompts]]
    loss = _heldout_loss(policy, tokenizer, heldout, config.sequence_length)
    openings = prose.cut_many_openings(heldout, tokenizer, config, count=config.heldout_pairs, rng=rng)
    pairs = _sample_pairs(openings, policy, tokenizer, config, seed=seed, progress=False)
    gap = _score(reward_model, [p.real for p in pairs]) - _score(reward_model, [p.sampled for p in pairs])
    repeated = [prompt for prompt in prompts for _ in range(config.curve_samples)]
    samples = _sample_ids(repeated, policy, tokenizer, config, description="Best of n" if progress else None)
    rewards = _score(reward_model, samples).view(len(prompts), config.curve_samples)
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    skewness = centred.pow(3).mean(1) / variance.pow(1.5)
    return {
        "heldout_loss": loss,
        "heldout_perplexity": torch.tensor(loss).exp().item(),
        "reward_pairwise_accuracy": ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item(),
        "heldout_pairs": len(pairs),
        "reward_mean": rewards.mean().item(),
        "reward_sd_within_prompt": variance.sqrt().mean().item(),
        "reward_skew_within_prompt": skewness.mean().item(),
        "best_of_n": worlds.best_of_n_curve(rewards),
    }


@torch.no_grad()
def _heldout_loss(model: Policy, tokenizer: Tokenizer, paragraphs: Sequence[str], length: int) -> float:
    """Mean negative log-likelihood in nats per token of whole paragraphs (cut at `length` tokens), eos included."""
    total, count = 0.0, 0
    for ids in lm.tokenize(paragraphs, tokenizer):
        row = torch.tensor([[*ids, tokenizer.eos_token_id][:length]])
        total += lm.next_token_loss(model, row).item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count
