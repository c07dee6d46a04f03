"""Splitting a rollout batch into micro-batches, and the forward pass of one."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tealightning.functional.log_probs import token_entropy, token_log_probs
from tealightning.types import RolloutBatch


def split_rows(
    prompt_lengths: Tensor, completion_lengths: Tensor, rows: Tensor, *, max_tokens: int, max_rows: int | None = None
) -> list[Tensor]:
    """Split `rows` into micro-batches of at most `max_tokens` padded tokens, longest first.

    Sorting by length keeps padding low; longest first makes an out-of-memory error come at the start of a step.

    Args:
        prompt_lengths: [B] int64.
        completion_lengths: [B] int64.
        rows: [R] int64, the rollouts to train on.
        max_tokens: Of a micro-batch: its rows times (its longest prompt + its longest completion), because prompts are
            padded on the left and completions on the right; a longer single rollout gets its own.
        max_rows: Most rollouts in a micro-batch.

    Returns:
        Index tensors that partition `rows`; at least one if `rows` is not empty.
    """
    if len(rows) == 0:
        return []
    ordered = rows[(prompt_lengths + completion_lengths)[rows].argsort(descending=True, stable=True)]
    sizes: list[int] = []
    width = length = 0
    for prompt, completion in zip(prompt_lengths[ordered].tolist(), completion_lengths[ordered].tolist(), strict=True):
        width, length = max(width, prompt), max(length, completion)
        if sizes and (sizes[-1] + 1) * (width + length) <= max_tokens and sizes[-1] != max_rows:
            sizes[-1] += 1
        else:
            sizes.append(1)
            width, length = prompt, completion
    return list(ordered.split(sizes))


@dataclass(kw_only=True, slots=True)
class CompletionScores:
    """What a causal LM says about the completions of some rollouts."""

    log_probs: Tensor  # [rows, t] float32 of each sampled token; 0 on padding
    mask: Tensor  # [rows, t] bool, True = sampled token
    entropy: Tensor | None = None  # [rows, t] float32 nats, without gradient; 0 on padding


def trim(rollouts: RolloutBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` of the batch without the padding that only longer rollouts need.

    Returns:
        (input_ids [rows, tp + t], attention_mask [rows, tp + t] bool, completion_mask [rows, t] bool)
    """
    width = max(1, int(rollouts.prompt_lengths[rows].max()))
    length = max(1, int(rollouts.completion_lengths[rows].max()))
    prompt_ids = rollouts.prompt_ids[rows][:, -width:]
    prompt_mask = rollouts.prompt_mask[rows][:, -width:]
    completion_mask = rollouts.completion_mask[rows][:, :length]
    input_ids = torch.cat([prompt_ids, rollouts.completion_ids[rows][:, :length]], dim=1)
    return input_ids, torch.cat([prompt_mask, completion_mask], dim=1), completion_mask


def score_completions(
    model: torch.nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False
) -> CompletionScores:
    """Log-probs of the sampled tokens under `model` and the rollouts' own sampling distribution.

    Masks and positions come from lengths, never from token ids; a prompt is never empty (the engine had to condition on
    something), so position `tp - 1` predicts the first sampled token of every row.
    """
    input_ids, attention_mask, mask = trim(rollouts, rows)
    length = mask.shape[1]
    extra: dict[str, Any] = {}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        extra["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = length + 1
    output = model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, **extra)
    logits = output.logits[:, -length - 1 : -1]
    targets = input_ids[:, -length:]
    sampling = rollouts.sampling
    log_probs = token_log_probs(
        logits, targets, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    scores = CompletionScores(log_probs=log_probs.masked_fill(~mask, 0.0), mask=mask)
    if with_entropy:
        with torch.no_grad():
            scores.entropy = token_entropy(logits, temperature=sampling.temperature).masked_fill(~mask, 0.0)
    return scores
