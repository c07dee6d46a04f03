"""Fingerprint of the policy's weights, which any change changes; and a change of them that is undone exactly."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK = 2**19  # numbers at a time: what they are multiplied with and their products stay in a processor's cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def fingerprint(policy: Any) -> bytes:
    """A digest of the bits of every parameter and buffer, of this rank's share where they are sharded. Equal for equal
    weights, on every device of a kind.

    It reads the weights themselves: a change through `.data`, as callbacks that average weights make it, raises no
    version that torch counts. Each chunk is a sum of its bits as numbers of 32 (or 16) bits, times odd random numbers
    of 64 bits: a changed number always changes it, several do but for a chance of about 2^-32.
    """
    tensors = [tensor for tensor in (*_local(policy), *policy.buffers()) if tensor.numel() > 0]
    with torch.inference_mode(False), torch.no_grad():
        sums = [part for tensor in tensors for part in _sums(tensor.detach())]
        digest = hashlib.blake2b(digest_size=16)
        for device in dict.fromkeys(part.device for part in sums):
            together = torch.stack([part for part in sums if part.device == device])
            digest.update(together.cpu().numpy().tobytes())
    return digest.digest()


@contextmanager
def changed_weights(policy: Any) -> Iterator[None]:
    """Inside, every parameter is another one of the same size; afterwards they are what they were, to the last bit.

    Matrices get other signs in some of their columns: no second copy of the model is made, and no activation gets
    larger. Vectors, and matrices of zeros, which have no sign, are kept and changed by more.
    """
    before = fingerprint(policy)
    undo: list[Callable[[], Any]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for number, tensor in enumerate(_local(policy)):
                if tensor.is_floating_point():
                    undo.append(_change(tensor, columns=2 + number % 3))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for restore in reversed(undo):
                restore()
        assert fingerprint(policy) == before, "the weights that were changed on trial are not what they were"


def _change(tensor: Tensor, columns: int) -> Callable[[], Any]:
    """Change one parameter in place, every so manieth of its `columns`; how to undo it."""
    if tensor.dim() < 2 or not tensor.any():
        kept = tensor.clone()
        numbers = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
        changed = torch.where(numbers % columns == 0, -tensor.float(), tensor.float()) + 0.25 * numbers.cos()
        tensor.copy_(changed)
        return lambda: tensor.copy_(kept)
    bits = tensor.view(_INTEGERS[tensor.itemsize])[..., ::columns]
    sign = torch.iinfo(bits.dtype).min

    def flip() -> None:
        bits.bitwise_xor_(sign)

    flip()
    return flip


def _local(policy: Any) -> list[Tensor]:
    """Every parameter once, detached: of one that is sharded over ranks, this rank's part."""
    for module in policy.modules():
        # After a forward pass without a backward pass FSDP2 holds some parameters gathered, in memory of their own.
        if hasattr(module, "reshard"):
            module.reshard()
    parameters = (parameter.detach() for parameter in policy.parameters())
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """A number of 64 bits for each chunk of a tensor."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    size = flat.numel() * flat.itemsize
    # Of 64 bits only products that do not overflow would be exact: these are two numbers of 32 bits.
    numbers = flat.view(torch.int32 if size % 4 == 0 and flat.storage_offset() % 4 == 0 else _INTEGERS[flat.itemsize])
    factors = _factors(numbers.device)
    products = torch.empty_like(factors[: len(numbers)])  # once: new memory for each chunk takes longer than all else
    for chunk in numbers.split(_CHUNK):
        yield torch.mul(chunk, factors[: len(chunk)], out=products[: len(chunk)]).sum()


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator, dtype=torch.int64)
    return (numbers | 1).to(device)
