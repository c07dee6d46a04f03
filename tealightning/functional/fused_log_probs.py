"""liger-kernel's fused kernel behind `linear_log_probs`, on the GPUs that it is made for."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

HOPPER = (9, 0)
"""Its compute capability. For other GPUs liger-kernel itself falls back to chunks of logits, as we do."""

CHECKED_TOKENS = 64
RELATIVE_ERROR = 0.05
"""Of bfloat16, which has eight bits, after two matrix products."""

LogProbs = Callable[..., tuple[Tensor, Tensor | None]]


def fused_log_probs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`linear_log_probs` in one kernel: neither logits nor probabilities are written to memory.

    Args:
        hidden: [n, D] bfloat16.
        weight: [V, D] bfloat16.
        token_ids: [n] int64.

    Returns:
        (log-probs [n] float32 with gradient, entropies [n] float32 in nats without, or None)
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Kernel

    ignored, tiles = -100, 1
    result = Kernel.apply(hidden.contiguous(), weight, token_ids, float(temperature), ignored, tiles, with_entropy)
    loss, entropy = result if with_entropy else (result, None)
    return -loss.float(), None if entropy is None else entropy.detach().float()


def can_fuse(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for `hidden` [n, D] and products in `dtype`."""
    return (
        hidden.is_cuda
        and dtype == torch.bfloat16
        and len(hidden) > 0
        and torch.cuda.get_device_capability(hidden.device) == HOPPER
        and _is_installed()
    )


@cache
def _is_installed() -> bool:
    """liger-kernel of a version that has the kernel, and what compiles it: the extra `fused`."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("cutlass") is None:
        return False
    return hasattr(importlib.import_module("liger_kernel.ops"), "LigerFusedLinearScaledCrossEntropyFunction")


def is_right(chunked: LogProbs, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> bool:
    """Whether the kernel gives what `chunked` gives, for some tokens of these: found out once for each shape.

    A kernel that is compiled for a card and shape it was never tried on can be wrong without an error.

    Args:
        chunked: `linear_log_probs` without the kernel.
    """
    shape = (hidden.device, weight.shape, temperature)
    if shape not in _right:
        _right[shape] = _agree(
            *(_trial(how, hidden, weight, token_ids, temperature) for how in (chunked, fused_log_probs))
        )
        if not _right[shape]:
            warnings.warn(
                f"liger-kernel's log-probs or gradients are not ours for an output layer of {tuple(weight.shape)} on "
                f"{torch.cuda.get_device_name(hidden.device)}: its kernel is not used.",
                stacklevel=2,
            )
    return _right[shape]


_right: dict[tuple[Any, ...], bool] = {}


def _trial(how: LogProbs, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> list[Tensor]:
    """Log-probs, entropies and gradients of tokens that count differently."""
    # Copies, made outside inference mode: the first use can be in an evaluation, whose tensors autograd does not take.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = hidden[:CHECKED_TOKENS].detach().clone().requires_grad_()
        layer = weight.detach().clone().requires_grad_()
        ids = token_ids[:CHECKED_TOKENS].clone()
        log_probs, entropy = how(inputs, layer, ids, temperature=temperature, with_entropy=True)
        worth = torch.linspace(-1, 2, len(inputs), device=hidden.device)
        gradients = torch.autograd.grad(log_probs, [inputs, layer], worth)
    assert entropy is not None
    return [log_probs.detach(), entropy, *gradients]


def _agree(ours: list[Tensor], fused: list[Tensor]) -> bool:
    """Whether results of the same products are equal up to the rounding of bfloat16."""
    return all(
        (a.float() - b.float()).norm() <= RELATIVE_ERROR * a.float().norm() for a, b in zip(ours, fused, strict=True)
    )
