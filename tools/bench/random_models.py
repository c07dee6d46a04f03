"""Seeded random models of the benchmarks' sizes, and a tokenizer as large as their vocabulary."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelShape:
    """Sizes of a random Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int | None = None  # None = the tokenizer's
    tied: bool = False
    rope_theta: float = 10_000.0
    max_positions: int = 1024
    reward_is_small: bool = False  # a reward model of MiniLM's size, not one of the policy's


SHAPES = {
    "10m": ModelShape(hidden=320, intermediate=960, layers=7, heads=5, kv_heads=5),
    "50m": ModelShape(hidden=640, intermediate=1920, layers=10, heads=10, kv_heads=10),
    "smollm2": ModelShape(  # SmolLM2-135M
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocabulary=49152,
        tied=True,
        rope_theta=100_000.0,
        max_positions=8192,
        reward_is_small=True,
    ),
}


def random_models(shape: ModelShape, tokenizer: Any) -> tuple[Any, Any]:
    """A policy and a reward model that read `tokenizer`."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": shape.tied,
        "dtype": torch.float32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = LlamaForCausalLM(LlamaConfig(**config))
        if shape.reward_is_small:
            return policy, small_classifier(tokenizer)
        return policy, LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1))


def small_classifier(tokenizer: Any) -> Any:
    """A BERT of MiniLM's size (6 layers of width 384) with one label; more positions, so that no text is too long."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id or 0,
            num_labels=1,
        )
        return BertForSequenceClassification(config)


def widened(tokenizer: Any, size: int) -> Any:
    """`tokenizer`, a byte-level BPE, with merges of two tokens more until it has `size` tokens: a random policy samples
    from all of its vocabulary, and what it samples must be text for the reward model to read."""
    if size == len(tokenizer):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    special = {token["content"] for token in state["added_tokens"]}
    pieces = [text for text in vocabulary if text not in special]
    endings = [text for text in pieces if text.isalpha() and text.isascii()]  # no space, so inside a word
    for first, second in ((first, second) for second in endings for first in pieces):
        if len(vocabulary) == size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert len(tokenizer) == size, (len(tokenizer), size)
    return tokenizer
