"""Fully sharded data parallelism (FSDP2): a rank holds a share of each weight, layers are gathered in use."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tealightning.errors import UserError


def shard(model: nn.Module, mesh: Any, *, lora: bool = False) -> None:
    """Shard a transformers model over a device mesh of Lightning's `ModelParallelStrategy`, in place, one unit a
    decoder layer.

    Embedding, output layer and final norm are a unit of their own, which stays gathered from a forward pass to its
    backward pass.

    Raises:
        ValueError: for tensor parallelism, or with an adapter.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy.tensor_parallel_size must be 1, with data_parallel_size the number of devices, got "
            f"{mesh['tensor_parallel'].size()}: policies are sharded over the data, not split inside layers."
        )
    if lora:
        raise UserError("model.lora cannot be sharded: use trainer.strategy=ddp, or model.lora=null.")
    for layer in _decoder_layers(model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def is_sharded(model: Any) -> bool:
    """Whether ranks must call the model together."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict; of a sharded model the full one on the CPU of rank 0, empty on the others, and all ranks must
    call this."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _decoder_layers(model: nn.Module) -> nn.ModuleList | list[nn.Module]:
    """The list of modules that holds most of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[])
