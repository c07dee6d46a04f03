"""Log-probs of completions under a causal LM: each prompt computed for all of its rollouts anew, or once for all."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tealightning.functional.log_probs import linear_log_probs, token_entropy, token_log_probs
from tealightning.training.padding import padding_of, reads_padding, rolled
from tealightning.types import CompletionScores, RolloutBatch, SamplingConfig


def score_completions(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False, share_prompts: bool = False
) -> CompletionScores:
    """Log-probs of the sampled tokens under `model` and the rollouts' own sampling distribution.

    Masks and positions come from lengths, never from token ids; a prompt is never empty (the engine had to condition on
    something), so its last position predicts the first sampled token of every row. Logits of all tokens never exist at
    once, except for models that change them after the output layer.

    With `share_prompts` each distinct prompt of `rows` goes through the model once, with gradient, and the completions
    continue from its keys and values: the same numbers up to rounding, for models that can (`can_share_prompts`).
    """
    head = linear_head(model)
    scores = None if head is None else _score_in_head(model, head, rollouts, rows, with_entropy, share_prompts)
    return scores or score_through_logits(model, rollouts, rows, with_entropy=with_entropy, share_prompts=share_prompts)


def score_through_logits(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False, share_prompts: bool = False
) -> CompletionScores:
    """`score_completions` with all logits at once: for models that change them, and for hooks of the output layer."""
    passed = _prepare(model, rollouts, rows, share_prompts)
    logits = passed.aligned(model(**passed.inputs).logits)
    log_probs = token_log_probs(logits, passed.targets, **_distribution(rollouts.sampling))
    scores = CompletionScores(log_probs=log_probs.masked_fill(~passed.mask, 0.0), mask=passed.mask)
    if with_entropy:
        with torch.no_grad():
            entropy = token_entropy(logits, temperature=rollouts.sampling.temperature)
        scores.entropy = entropy.masked_fill(~passed.mask, 0.0)
    return scores


def trim(rollouts: RolloutBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` of the batch without the padding that only longer rollouts need: input_ids [rows, tp + t], attention_mask
    [rows, tp + t] bool and completion_mask [rows, t] bool."""
    width = max(1, int(rollouts.prompt_lengths[rows].max()))
    length = max(1, int(rollouts.completion_lengths[rows].max()))
    completion_mask = rollouts.completion_mask[rows][:, :length]
    input_ids = torch.cat([rollouts.prompt_ids[rows][:, -width:], rollouts.completion_ids[rows][:, :length]], dim=1)
    return input_ids, torch.cat([rollouts.prompt_mask[rows][:, -width:], completion_mask], dim=1), completion_mask


# ---------------------------------------------------------------- forward passes


@dataclass(kw_only=True, slots=True)
class _Pass:
    """A forward pass, and how its outputs predict the tokens of the completions."""

    inputs: dict[str, Any]
    targets: Tensor  # [rows, t] int64
    mask: Tensor  # [rows, t] bool
    aligned: Callable[[Tensor], Tensor]  # [rows, t, ...] where the outputs predict the targets


def _prepare(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor, share_prompts: bool, head: nn.Module | None = None
) -> _Pass:
    """The pass that is left to do; with `share_prompts` the prompts are behind it, of which only what enters the `head`
    is computed if one is given."""
    return _after_prompts(model, rollouts, rows, head) if share_prompts else _whole_rows(model, rollouts, rows)


def _whole_rows(model: nn.Module, rollouts: RolloutBatch, rows: Tensor) -> _Pass:
    """Prompts and completions of `rows` in one pass. For models that would read padding, all of it is on the right."""
    input_ids, attention_mask, mask = trim(rollouts, rows)
    targets, padding = input_ids[:, -mask.shape[1] :], None
    if reads_padding(model):
        padding = padding_of(attention_mask)
        input_ids, attention_mask = rolled(input_ids, -padding), rolled(attention_mask, -padding)
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    keep = 0 if padding is not None else mask.shape[1] + 1
    inputs = _inputs(model, input_ids, attention_mask, positions, logits_to_keep=keep) | {"use_cache": False}

    def aligned(outputs: Tensor) -> Tensor:
        return (outputs if padding is None else rolled(outputs, padding))[:, -mask.shape[1] - 1 : -1]

    return _Pass(inputs=inputs, targets=targets, mask=mask, aligned=aligned)


def _after_prompts(model: nn.Module, rollouts: RolloutBatch, rows: Tensor, head: nn.Module | None) -> _Pass:
    """The pass over the completions of `rows`, after one over their distinct prompts."""
    ids, lengths, prompt_of = distinct_prompts(rollouts, rows)
    prompt_mask = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - lengths[:, None]
    with nullcontext() if head is None else _in_place_of(head, lambda hidden: hidden):
        logits, cache = read_prompts(model, ids, prompt_mask)
    cache.reorder_cache(prompt_of)

    length = max(1, int(rollouts.completion_lengths[rows].max()))
    targets, mask = rollouts.completion_ids[rows][:, :length], rollouts.completion_mask[rows][:, :length]
    # The last token is predicted and predicts nothing; a model that ranks call together wants an input all the same.
    given, given_mask = targets[:, : max(1, length - 1)], mask[:, : max(1, length - 1)]
    attention_mask = torch.cat([prompt_mask[prompt_of], given_mask], dim=1)
    positions = (lengths[prompt_of][:, None] + given_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    first = logits[:, -1:].index_select(0, prompt_of)

    def aligned(outputs: Tensor) -> Tensor:
        return torch.cat([first, outputs[:, : length - 1]], dim=1)

    inputs = _inputs(model, given, attention_mask, positions) | {"use_cache": True, "past_key_values": cache}
    return _Pass(inputs=inputs, targets=targets, mask=mask, aligned=aligned)


def read_prompts(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """What the model says after prompts [prompts, tp], left-padded with `mask` bool, and the cache of their keys and
    values, from which completions go on.

    Raises:
        CannotContinue: if there is no such cache.
    """
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    output = model(**_inputs(model, ids, mask, positions, logits_to_keep=1), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None or cache.get_seq_length() != ids.shape[1]:
        raise CannotContinue("it keeps no key-value cache of the prompts")
    return output.logits, cache


class CannotContinue(Exception):
    """The model gives nothing from which completions could go on after their prompts; the text says why."""


def distinct_prompts(rollouts: RolloutBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different prompts of `rows`: ids [prompts, tp] left-padded, lengths [prompts], and each row's own [rows]."""
    width = max(1, int(rollouts.prompt_lengths[rows].max()))
    # The length is part of it: where padding is a token's id, two prompts could look alike.
    keys = torch.cat([rollouts.prompt_lengths[rows][:, None], rollouts.prompt_ids[rows][:, -width:]], dim=1)
    distinct, prompt_of = keys.unique(dim=0, return_inverse=True)
    return distinct[:, 1:], distinct[:, 0], prompt_of


def _inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, *, logits_to_keep: int = 0
) -> dict[str, Any]:
    """Arguments of the model's forward pass, of those that it has; `logits_to_keep` 0 = all."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    if "position_ids" in accepted:
        inputs["position_ids"] = positions
    if "logits_to_keep" in accepted and logits_to_keep > 0:
        inputs["logits_to_keep"] = logits_to_keep
    return inputs


def _distribution(sampling: SamplingConfig) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


# ---------------------------------------------------------------- in the output layer

_ALTERS_LOGITS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models found to do something to the output layer's result (a softcap, a scale) or not to call the layer at all."""


def linear_head(model: Any) -> nn.Linear | None:
    """The output layer if the logits are exactly what it returns, else None.

    Whether a model changes its logits afterwards is found out by scoring, not from lists of architectures.
    """
    if model in _ALTERS_LOGITS or hasattr(model, "_orig_mod"):  # torch.compile would compile anew at every call
        return None
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def _score_in_head(
    model: Any, head: nn.Linear, rollouts: RolloutBatch, rows: Tensor, with_entropy: bool, share_prompts: bool
) -> CompletionScores | None:
    """Call the whole model, so that wrappers around it (FSDP, adapters, autocast) do their work, with a function in the
    place of its output layer that returns log-probs and not logits.

    None if the model did not pass them on as they were: they are worthless then, and the model is remembered.
    """
    passed = _prepare(model, rollouts, rows, share_prompts, head)
    targets, mask = passed.targets, passed.mask
    made: list[CompletionScores] = []

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    def score(hidden: Tensor) -> Tensor:
        """[rows, t] from what enters the output layer, of which padding is left out."""
        log_probs, entropy = linear_log_probs(
            passed.aligned(hidden)[mask],
            head.weight,
            targets[mask],
            bias=head.bias,
            with_entropy=with_entropy,
            **_distribution(rollouts.sampling),
        )
        entropies = None if entropy is None else padded(entropy)
        made.append(CompletionScores(log_probs=padded(log_probs), mask=mask, entropy=entropies))
        return made[-1].log_probs

    with _in_place_of(head, score):
        result = model(**passed.inputs).logits
    if len(made) == 1:
        scores = made[0]
        if result is scores.log_probs or (result.shape == mask.shape and result.equal(scores.log_probs)):
            return scores
    _ALTERS_LOGITS.add(model)
    return None


@contextmanager
def _in_place_of(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output layer is `function`."""
    head.forward = function  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del head.forward
