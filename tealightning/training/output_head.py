"""Make a causal LM's output layer return log-probs of the sampled tokens in place of logits."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ALTERS_LOGITS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models found to do something to the output layer's result (a softcap, a scale) or not to call the layer at all."""


def linear_head(model: Any) -> nn.Linear | None:
    """The output layer if the logits are exactly what it returns, else None.

    Whether a model changes its logits afterwards is found out by `scored_by_head`, not from lists of architectures.
    """
    if model in _ALTERS_LOGITS or hasattr(model, "_orig_mod"):  # torch.compile would compile anew at every call
        return None
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def scored_by_head(
    model: Any, head: nn.Linear, score: Callable[[Tensor, nn.Linear], Tensor], inputs: dict[str, Any]
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
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.forward
