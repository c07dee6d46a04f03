"""Reward model of the prose world: real continuations against the policy's, by Bradley-Terry."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tealightning.worlds.policy import Descent, llama_config, sample_completions, tokenize
from tealightning.worlds.prose_config import ProseConfig
from tealightning.worlds.prose_text import Opening


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two continuations of one prompt, as the reward model reads them: prompt + continuation, tokenized as one text."""

    prompt_length: int  # tokens that both start with
    real: list[int]
    sampled: list[int]


def sample_pairs(
    openings: Sequence[Opening],
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new_tokens: int,
    seed: int,
    progress: bool,
) -> list[Pair]:
    """Sample the policy at temperature 1: one pair per opening."""
    torch.manual_seed(seed)
    sampled = sample_completions(
        policy,
        tokenizer,
        [o.prompt for o in openings],
        max_new_tokens=max_new_tokens,
        description="Pairs" if progress else None,
    )
    texts = tokenize([o.prompt + text for o, text in zip(openings, sampled, strict=True)], tokenizer)
    return [
        Pair(prompt_length=len(o.prompt_ids), real=o.prompt_ids + o.continuation_ids, sampled=ids)
        for o, ids in zip(openings, texts, strict=True)
    ]


def train_reward_model(
    pairs: Sequence[Pair],
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: ProseConfig,
    *,
    seed: int,
    progress: bool,
) -> LlamaForSequenceClassification:
    """Train by Bradley-Terry on every prefix of the continuations, starting from the policy's first layers.

        loss = -mean_t log sigmoid(r_t(real) - r_t(sampled))

    over the positions `t` after the prompt, `r_t` the score of the text up to `t` or up to its end, whichever comes
    first: one pair teaches as often as it has tokens, and the reward at the last token adds up evidence from the whole
    continuation.
    """
    torch.manual_seed(seed)
    model = initial_reward_model(policy, tokenizer, config)
    descent = Descent(
        model,
        steps=config.reward_steps,
        adamw_lr=config.reward_lr,
        muon_lr=config.reward_muon_lr,
        weight_decay=config.reward_weight_decay,
    )
    rng = random.Random(seed)
    model.train()
    for _ in track(range(config.reward_steps), description="Reward model", disable=not progress):
        batch = rng.sample(pairs, config.reward_batch_size)
        descent.step(_bradley_terry(model, batch, tokenizer.pad_token_id))
    return model.eval()


def initial_reward_model(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: ProseConfig
) -> LlamaForSequenceClassification:
    """The policy's embeddings and first `reward_layers` layers under a zero scalar head."""
    architecture = llama_config(tokenizer, config, layers=config.reward_layers, max_positions=config.max_positions)
    architecture.num_labels = 1
    model = LlamaForSequenceClassification(architecture)
    model.model.load_state_dict(policy.model.state_dict(), strict=False)  # the policy has more layers
    torch.nn.init.zeros_(model.score.weight)
    return model


@torch.no_grad()
def score_ids(
    model: LlamaForSequenceClassification, sequences: Sequence[Sequence[int]], *, batch_size: int = 256
) -> Tensor:
    """Rewards [B] float64 of token sequences, through the model's own pooling (last token that is no padding)."""
    scores = []
    for start in range(0, len(sequences), batch_size):
        ids, lengths = _right_pad(sequences[start : start + batch_size], model.config.pad_token_id)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        scores.append(model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].double())
    return torch.cat(scores)


def _bradley_terry(model: LlamaForSequenceClassification, pairs: Sequence[Pair], pad: int) -> Tensor:
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
