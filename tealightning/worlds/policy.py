"""The policy: a small Llama trained from scratch on the corpus, and how it is sampled."""

import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.worlds.optim import Descent
from tealightning.worlds.prose_config import ProseConfig
from tealightning.worlds.tokenizer import tokenize


def llama_config(config: ProseConfig, tokenizer: PreTrainedTokenizerFast, *, layers: int) -> LlamaConfig:
    """The architecture of the policy (and, with fewer `layers`, of the reward model); untied embeddings."""
    heads = config.hidden_size // config.head_size
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )


def train_policy(
    paragraphs: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: ProseConfig,
    *,
    seed: int,
    progress: bool,
) -> LlamaForCausalLM:
    """Next-token training on the paragraphs, joined by end-of-text tokens in a new random order every epoch."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(config, tokenizer, layers=config.policy_layers))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    descent = Descent(
        model, steps=config.policy_steps, adamw_lr=config.policy_lr, muon_lr=config.policy_muon_lr, weight_decay=0.1
    )
    rows = _endless_rows(tokenize(paragraphs, tokenizer), tokenizer.eos_token_id, config, seed=seed)
    model.train()
    for _ in track(range(config.policy_steps), description="Policy", disable=not progress):
        descent.step(_next_token_loss(model, next(rows)))
    return model.eval()


@torch.no_grad()
def heldout_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, paragraphs: Sequence[str], length: int
) -> float:
    """Mean negative log-likelihood in nats per token of whole paragraphs (cut at `length` tokens), eos included."""
    total, count = 0.0, 0
    for ids in tokenize(paragraphs, tokenizer):
        row = torch.tensor([[*ids, tokenizer.eos_token_id][:length]])
        total += _next_token_loss(model, row).item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count


@torch.no_grad()
def sample_completions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    description: str | None = None,
) -> list[list[int]]:
    """One completion per prompt from the plain softmax at `temperature`, without its eos; uses torch's global RNG."""
    sampling = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,  # transformers would keep only the 50 most likely tokens
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions: list[list[int]] = []
    starts = range(0, len(prompt_ids), batch_size)
    for start in track(starts, description=description or "", disable=description is None):
        batch = tokenizer.pad({"input_ids": list(prompt_ids[start : start + batch_size])}, return_tensors="pt")
        sampled = model.generate(**batch, generation_config=sampling)[:, batch["input_ids"].shape[1] :]
        completions += [_before_eos(row, tokenizer.eos_token_id) for row in sampled.tolist()]
    return completions


def _next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of `rows` [B, T] in nats per token."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _endless_rows(paragraph_ids: list[list[int]], eos: int, config: ProseConfig, *, seed: int) -> Iterator[Tensor]:
    """Batches [policy_batch_size, sequence_length + 1] of int64."""
    rng = random.Random(seed)
    width = config.policy_batch_size * (config.sequence_length + 1)
    stream: list[int] = []
    while True:
        for ids in rng.sample(paragraph_ids, len(paragraph_ids)):
            stream += [*ids, eos]
            while len(stream) >= width:
                yield torch.tensor(stream[:width]).view(config.policy_batch_size, -1)
                stream = stream[width:]


def _before_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids
