"""Low-rank adapters (LoRA) through peft: only small matrices beside the frozen linear layers are trained."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tealightning.checks import check_integer, check_positive
from tealightning.errors import MissingPackageError, UserError


@dataclass(kw_only=True, slots=True)
class LoRA:
    """Settings of the adapter: each targeted weight W [out, in] acts as `W + scale * B @ A`, and A, B are trained.

    `scale` is `alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised (Hu et al. 2021, Kalajdzievski 2023). B starts
    at 0: training starts from the policy as it was loaded. No dropout: the trainer scores as it sampled.

    Args:
        rank: Rows of A [rank, in] and columns of B [out, rank].
        alpha: Numerator of `scale`.
        target_modules: `all-linear` = every linear layer but the head, or names of modules as in peft: a list of
            endings (`[q_proj, v_proj]`) or a regular expression. A weight tied to another one cannot be targeted.
        rank_stabilized: Divide by the root of the rank, with which large ranks learn as fast as small ones.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str = "all-linear"
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 1)
        check_positive("lora.alpha", self.alpha)
        if not self.target_modules:
            raise UserError("lora.target_modules is empty: name modules, or all-linear.")


def add_adapter(policy: Any, lora: LoRA) -> None:
    """Freeze a transformers model and put a trainable adapter into it, in place; in float32 if it is in half precision.

    peft's wrapper around it, which would hide `config`, `generate` and the arguments of `forward`, is not kept.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if nothing matches `target_modules`, or something that no adapter can be put on.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError(
            f'model.lora needs peft, which cannot be imported ({error}): pip install "tealightning[lora]".'
        ) from error
    scale: Any = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rank_stabilized}
    config = LoraConfig(target_modules=lora.target_modules, **scale)
    try:
        get_peft_model(policy, config)  # also lets checkpointed layers have a gradient behind the frozen embedding
    except ValueError as error:
        raise UserError(
            f"model.lora.target_modules={lora.target_modules!r} does not fit the policy: {error}"
        ) from error
    policy.train(policy.training)  # the new modules too
    _check_untied(policy)


def _check_untied(policy: nn.Module) -> None:
    """Refuse adapters on weights that have several names: merged, they would no longer be one weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    for layer in _adapter_layers(policy):
        tied = names[id(_adapted_weight(layer))]
        if len(tied) > 1:
            raise UserError(
                f"model.lora.target_modules targets a weight that this policy ties ({', '.join(tied)}), and the merged "
                "policy could not tie it any more. Leave it out."
            )


def has_adapter(policy: nn.Module) -> bool:
    """Whether `add_adapter` has put an adapter into the policy."""
    return hasattr(policy, "peft_config")


def _adapter_layers(policy: nn.Module) -> list[Any]:
    """peft's layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]


def _adapted_weight(layer: Any) -> nn.Parameter:
    """What an adapter of peft adds to: experts are a parameter each of one module, others the weight of a layer."""
    base = layer.get_base_layer()
    return getattr(base, getattr(layer, "parameter_name", "weight"))  # type: ignore[no-any-return]


class WithoutAdapter:
    """The policy as it was loaded: the same weights, with the adapter off for the time of a forward pass."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        # What scoring looks up before it calls the model.
        self.forward = policy.forward
        self._is_stateful = getattr(policy, "_is_stateful", False)
        self.get_output_embeddings = policy.get_output_embeddings
        self.dtype = policy.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with adapter_off(self.policy):
            return self.policy(*args, **kwargs)

    def to(self, device: torch.device) -> "WithoutAdapter":
        return self  # it is where the policy is


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """Inside, the policy is the one that it was before training."""
    layers = _adapter_layers(policy)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# ---------------------------------------------------------------- weights as if there were no adapter


def without_adapter(policy: nn.Module) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The state dict with names as if there were no adapter, live and detached; and what gives the weight of a name as
    if the adapter had been trained in: `W + scale * B @ A`, computed when it is asked for, in the dtype of W."""
    layers = _adapter_layers(policy)
    matrices = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    adapter = {id(parameter) for matrix in matrices for parameter in matrix.parameters()}
    adapted = {id(_adapted_weight(layer)): layer for layer in layers}
    live = dict(policy.state_dict(keep_vars=True))
    layer_of = {plain_name(name): adapted.get(id(value)) for name, value in live.items()}
    state = {plain_name(name): value.detach() for name, value in live.items() if id(value) not in adapter}

    @torch.no_grad()
    def merged(name: str) -> Tensor:
        weight, layer = state[name], layer_of[name]
        if layer is None or layer.merged:  # by peft's `merge_adapter`
            return weight
        return (weight + layer.get_delta_weight("default")).to(weight.dtype)

    return state, merged


def merged_state_dict(policy: nn.Module) -> dict[str, Tensor]:
    """The state dict of the policy with its adapter merged, the merged weights on the CPU."""
    state, merged = without_adapter(policy)
    weights = ((name, value, merged(name)) for name, value in state.items())
    return {name: value if weight is value else weight.cpu() for name, value, weight in weights}


def plain_name(name: str) -> str:
    """The name of a parameter in the policy as it was loaded."""
    return re.sub(r"(\.base_layer)+\.", ".", name).replace("_orig_mod.", "")  # what peft and torch.compile add
