"""Names and layout of a saved checkpoint, made group by group from a live transformers model.

transformers renames modules and fuses experts on loading, and reverts that in `save_pretrained`. Engines load
checkpoints: they are given what `save_pretrained` would write, and there is never a second copy of the model.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

# Groups of a model, by its live names: they depend on nothing else, and finding them takes a second with many experts.
_GROUPS: WeakKeyDictionary[nn.Module, tuple[list[str], list[list[str]]]] = WeakKeyDictionary()


def saved_weights(policy: nn.Module, live: dict[str, Tensor], read: Callable[[str], Tensor]) -> Iterator[Any]:
    """`(name, tensor)` of each entry of the checkpoint that `save_pretrained` would write, tied ones once.

    Args:
        policy: The model that knows how it was converted when it was loaded.
        live: The tensors of its state dict by name, of which only the shape is used.
        read: The full tensor of a name; called for one group (a layer) at a time.
    """
    for group in groups(policy, live):
        yield from _reverted(policy, {name: read(name) for name in group}).items()


def saved_names(policy: nn.Module, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that `saved_weights` gives, each with a tensor without data of its shape and dtype."""
    return _reverted(policy, {name: _empty(live[name]) for name in _kept(policy, live)})


def tied_names(policy: nn.Module, live: dict[str, Tensor]) -> dict[str, list[str]]:
    """Of each saved name that stands for a tied weight, the other names under which an engine may keep a copy."""
    tied: dict[str, list[str]] = {}
    for kept, *others in _ties(policy):
        if kept in live:
            (name,) = _reverted(policy, {kept: _empty(live[kept])})
            tied[name] = [saved for other in others for saved in _reverted(policy, {other: _empty(live[kept])})]
    return tied


def groups(policy: nn.Module, live: dict[str, Tensor]) -> list[list[str]]:
    """The live names, in groups that can be converted one without the others: layers, and each of the rest."""
    names = _kept(policy, live)
    found = _GROUPS.get(policy)
    if found is None or found[0] != names:
        layers: dict[str, list[str]] = {}
        for name in names:
            layer = re.match(r".*?\.\d+(?=\.)", name)
            layers.setdefault(layer[0] if layer else name, []).append(name)
        parts = [_reverted(policy, {name: _empty(live[name]) for name in layer}) for layer in layers.values()]
        shapes = {name: tensor.shape for part in parts for name, tensor in part.items()}
        whole = {name: tensor.shape for name, tensor in saved_names(policy, live).items()}
        # A conversion across layers needs all of them at once.
        found = _GROUPS[policy] = names, list(layers.values()) if shapes == whole else [names]
    return found[1]


def _reverted(policy: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(policy, PreTrainedModel):
        return tensors
    return revert_weight_conversion(policy, tensors)  # type: ignore[no-any-return]


def _kept(policy: nn.Module, live: dict[str, Tensor]) -> list[str]:
    """The live names that are saved: of tied ones, the first of `_ties`."""
    left_out = {other for _, *others in _ties(policy) for other in others}
    ignored = set(getattr(policy, "_keys_to_ignore_on_save", None) or ())
    return [name for name in live if name not in left_out | ignored]


def _ties(policy: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, that under which it is saved first."""
    from tealightning.training.lora import plain_name

    names: dict[int, list[str]] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    targets = getattr(policy, "all_tied_weights_keys", None) or {}
    return [sorted(tied, key=targets.__contains__) for tied in names.values() if len(tied) > 1]


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
