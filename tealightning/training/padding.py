"""Models that read the padding on their left, which an attention mask should hide: some recurrent ones."""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor

_READS: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()
MOST_EFFECT = 0.05
"""Of tokens that the mask hides, relative to their effect where it shows them. 1 = the mask is not looked at."""


def reads_padding(model: Any) -> bool:
    """Whether tokens before the first one that counts change what a model says, whatever its mask (RWKV, xLSTM,
    RecurrentGemma). Tried once for each model with a state of its own; attention has masks."""
    if model not in _READS:
        accepted = inspect.signature(model.forward).parameters
        has_state = getattr(model, "_is_stateful", False) or "attention_mask" not in accepted
        _READS[model] = has_state and _effect(model, accepted) > MOST_EFFECT
    return _READS[model]


@torch.no_grad()
def _effect(model: Any, accepted: Any) -> float:
    """How far hidden tokens move the last logits, as a share of how far they do when shown."""
    shown = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 0, 1, 0, 1]]).repeat(2, 1)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": torch.cat([shown, torch.ones_like(shown)], dim=1), "use_cache": False}
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    hidden_0, hidden_1, shown_0, shown_1 = model(**inputs).logits[:, -1].float()
    return float((hidden_0 - hidden_1).norm() / (shown_0 - shown_1).norm())


def padding_of(attention_mask: Tensor) -> Tensor:
    """[rows] tokens that are left out on the left of each row of `attention_mask` [rows, width]."""
    return attention_mask.long().argmax(dim=1)


def rolled(values: Tensor, steps: Tensor) -> Tensor:
    """`values` [rows, width, ...], each row moved to the right by its number of `steps` [rows], around the end.

    >>> rolled(torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]]), torch.tensor([-2, -1]))
    tensor([[5, 6, 0, 0],
            [7, 8, 9, 0]])
    """
    width = values.shape[1]
    index = (torch.arange(width, device=values.device) - steps[:, None]) % width
    return values[torch.arange(len(values), device=values.device)[:, None], index]
