"""The policy's weights: sharded over ranks (FSDP2), gathered, and handed out for engines to load or for export."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tealightning.errors import UserError
from tealightning.training.lora import has_adapter, merged_names, merged_parameters, merged_state_dict, plain_name


def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of every parameter, detached, not copied, each when its turn comes: a sharded one is gathered,
    and one with an adapter is merged, so that there is never a second copy of them all.

    Tied parameters appear under every name: an engine with a copy of `lm_head.weight` would otherwise keep the old one.
    """
    if has_adapter(policy):
        return merged_parameters(policy)
    parameters = policy.named_parameters(remove_duplicate=False)
    return ((plain_name(name), whole(parameter.detach())) for name, parameter in parameters)


def weight_names(policy: nn.Module) -> set[str]:
    """The names in `policy_weights`, without gathering or merging anything."""
    if has_adapter(policy):
        return set(merged_names(policy))
    return {plain_name(name) for name, _ in policy.named_parameters(remove_duplicate=False)}


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
            f"sync_weights needs every parameter of the policy, tied ones under each name (policy_weights gives "
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
