"""Split a rollout batch into micro-batches, and score the completions of one: log-probs and entropies of its tokens."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tealightning.functional.log_probs import linear_log_probs, token_entropy, token_log_probs
from tealightning.types import CompletionScores, RolloutBatch, SamplingConfig


def tokens_of_a_pass(device: torch.device) -> int:
    """Padded tokens of a forward pass that suit a device: a GPU wants many; on a CPU, passes whose activations stay in
    its caches are a quarter faster and more."""
    return 2_048 if device.type == "cpu" else 16_384


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
    something), so position `tp - 1` predicts the first sampled token of every row. Logits of all tokens never exist at
    once, except for models that change them after the output layer.
    """
    head = linear_head(model)
    if head is not None:
        inputs, scorer = _prepared(model, rollouts, rows, with_entropy=with_entropy)
        if scored_by_head(model, head, scorer, inputs):
            return scorer.scores
    return score_through_logits(model, rollouts, rows, with_entropy=with_entropy)


def score_through_logits(
    model: torch.nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False
) -> CompletionScores:
    """`score_completions` with all logits at once: for models that change them, and for hooks of the output layer."""
    inputs, scorer = _prepared(model, rollouts, rows, with_entropy=with_entropy)
    mask, sampling = scorer.mask, rollouts.sampling
    logits = model(**inputs).logits[:, -mask.shape[1] - 1 : -1]
    log_probs = token_log_probs(logits, scorer.targets, **_distribution(sampling))
    scores = CompletionScores(log_probs=log_probs.masked_fill(~mask, 0.0), mask=mask)
    if with_entropy:
        with torch.no_grad():
            entropy = token_entropy(logits, temperature=sampling.temperature)
        scores.entropy = entropy.masked_fill(~mask, 0.0)
    return scores


def _prepared(
    model: torch.nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool
) -> tuple[dict[str, Any], "_HeadScorer"]:
    """The model's arguments, and what is to be scored."""
    input_ids, attention_mask, mask = trim(rollouts, rows)
    targets = input_ids[:, -mask.shape[1] :]
    inputs = _model_inputs(model, input_ids, attention_mask, kept=mask.shape[1] + 1)
    return inputs, _HeadScorer(targets=targets, mask=mask, sampling=rollouts.sampling, with_entropy=with_entropy)


@dataclass(kw_only=True)
class _HeadScorer:
    """Stands in for the output layer: keeps the scores of the sampled tokens and returns their log-probs."""

    targets: Tensor  # [rows, t] int64
    mask: Tensor  # [rows, t] bool
    sampling: SamplingConfig
    with_entropy: bool

    def __call__(self, hidden: Tensor, head: torch.nn.Linear) -> Tensor:
        """[rows, t] from `hidden` [rows, t + 1 or more, D], of which padding is left out."""
        log_probs, entropy = linear_log_probs(
            hidden[:, -self.mask.shape[1] - 1 : -1][self.mask],
            head.weight,
            self.targets[self.mask],
            bias=head.bias,
            with_entropy=self.with_entropy,
            **_distribution(self.sampling),
        )
        self.scores = CompletionScores(
            log_probs=_padded(log_probs, self.mask),
            mask=self.mask,
            entropy=None if entropy is None else _padded(entropy, self.mask),
        )
        return self.scores.log_probs


def _model_inputs(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, *, kept: int) -> dict[str, Any]:
    """Arguments of the model's forward pass; logits are needed at the last `kept` positions."""
    forward: Any = model.forward
    accepted = _accepted_arguments(getattr(forward, "__func__", forward))  # a bound method in the cache would keep it
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    return inputs


@cache
def _accepted_arguments(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _distribution(sampling: SamplingConfig) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


def _padded(values: Tensor, mask: Tensor) -> Tensor:
    """[rows, t]: `values` [n] where `mask` is True, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


# ---------------------------------------------------------------- scores in place of logits

_ALTERS_LOGITS: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
"""Models found to do something to the output layer's result (a softcap, a scale) or not to call the layer at all."""


def linear_head(model: Any) -> torch.nn.Linear | None:
    """The output layer if the logits are exactly what it returns, else None.

    Whether a model changes its logits afterwards is found out by `scored_by_head`, not from lists of architectures.
    """
    if model in _ALTERS_LOGITS or hasattr(model, "_orig_mod"):  # torch.compile would compile anew at every call
        return None
    head = model.get_output_embeddings()
    return head if type(head) is torch.nn.Linear else None


def scored_by_head(
    model: Any, head: torch.nn.Linear, score: Callable[[Tensor, torch.nn.Linear], Tensor], inputs: dict[str, Any]
) -> bool:
    """Call `model(**inputs)` with `score(hidden [rows, kept, D], head)` in the place of the output layer.

    The whole model is called, so that wrappers around it (FSDP, adapters, autocast) do their work.

    Returns:
        Whether the model passed the scores on as they were. If not they are worthless, and the model is remembered:
        `linear_head` is None from then on.
    """
    made: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        made.append(score(hidden, head))
        return made[0]

    with _forward_of(head, forward):
        result = model(**inputs).logits
    passed_on = len(made) == 1 and (result is made[0] or (result.shape == made[0].shape and result.equal(made[0])))
    if not passed_on:
        _ALTERS_LOGITS.add(model)
    return passed_on


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.forward
