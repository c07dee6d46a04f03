"""The policy's weights: sharded over ranks (FSDP2), gathered, and handed out for engines to load or for export."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tealightning.errors import UserError
from tealightning.training.lora import has_adapter, merged_state_dict, plain_name, without_adapter
from tealightning.training.saved_weights import saved_names, saved_weights, tied_names


def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of every weight as `save_pretrained` would write it: the names and layout of a checkpoint,
    experts one by one, tied weights under one name; detached, and not copied where the layout is the same.

    Sharded ones are gathered and ones with an adapter merged layer by layer: there is never a second copy of them all.
    """
    policy = plain(policy)
    live, read = _live(policy)
    return saved_weights(policy, live, read)


def weight_names(policy: nn.Module) -> set[str]:
    """The names in `policy_weights`, without gathering or merging anything."""
    policy = plain(policy)
    return set(saved_names(policy, _live(policy)[0]))


def tied_weight_names(policy: nn.Module) -> dict[str, list[str]]:
    """For each name in `policy_weights` of a weight that is tied, its other names."""
    policy = plain(policy)
    return tied_names(policy, _live(policy)[0])


def plain(policy: nn.Module) -> nn.Module:
    """The model inside a compiled one."""
    return getattr(policy, "_orig_mod", policy)


def _live(policy: nn.Module) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The state dict without an adapter, by the names that the policy was loaded with, and what reads a full tensor."""
    if has_adapter(policy):
        return without_adapter(policy)
    state = {plain_name(name): value for name, value in policy.state_dict().items() if isinstance(value, Tensor)}
    return state, lambda name: whole(state[name].detach())


def policy_state_dict(policy: nn.Module) -> dict[str, Any]:
    """The state dict for export: an adapter is merged; a sharded policy's is whole, on the CPU of rank 0 and empty on
    the others, and all ranks must call this."""
    if has_adapter(policy):
        return merged_state_dict(policy)
    if not is_sharded(policy):
        return policy.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ---------------------------------------------------------------- a push of all weights to an engine


def checked_off(weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """`weights`, detached, one at a time; each name that comes by leaves `missing`."""
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor.detach()


def refuse_partial_push(missing: set[str]) -> None:
    """Refuse a push that lacked a parameter, whose old value an engine would go on with. Called when it has ended,
    because vLLM cannot end one in the middle."""
    if missing:
        raise ValueError(
            "sync_weights needs every weight of the policy by its name in a saved checkpoint (policy_weights gives "
            f"them); missing: {', '.join(sorted(missing))}."
        )


# ---------------------------------------------------------------- sharding


def shard(model: nn.Module, mesh: Any, *, lora: bool = False) -> None:
    """Shard a transformers model over a device mesh of Lightning's `ModelParallelStrategy`, in place: a rank holds a
    share of each weight, and layers are gathered in use. Embedding, output layer and final norm are a unit of their
    own, which stays gathered from a forward pass to its backward pass."""
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy.tensor_parallel_size must be 1, with data_parallel_size the number of devices, got "
            f"{mesh['tensor_parallel'].size()}: policies are sharded over the data, not split inside layers."
        )
    if lora:
        raise UserError("model.lora cannot be sharded: use trainer.strategy=ddp, or model.lora=null.")
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # The list that holds most of the model is that of the decoder layers.
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]):
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def is_sharded(model: Any) -> bool:
    """Whether ranks must call the model together."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_sync(policy: Any, strategy: Any, *, wanted: bool) -> Any:
    """Context: whether ranks exchange gradients in a backward pass inside."""
    if is_sharded(policy):
        policy.set_requires_gradient_sync(wanted)
    block = getattr(strategy, "block_backward_sync", None)
    return block() if block is not None and not wanted else nullcontext()
