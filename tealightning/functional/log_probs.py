"""Log-probs of sampled tokens: from logits, from hidden states in chunks, or by liger-kernel's fused kernel."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def filter_logits(logits: Tensor, keep_ids: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits [..., V], with temperature applied, outside top-k and then top-p to -inf, as samplers do.

    `top_k` keeps the k largest (ties at the k-th stay; 0 = all), `top_p` the smallest set of largest probabilities that
    sums to at least `top_p` (1 = all). The sampled tokens `keep_ids` [...] always stay: rounding differences between
    engine and trainer can put a token of the edge on different sides, and its log-prob must stay finite.

    >>> filter_logits(torch.tensor([3.0, 2.0, 1.0]), torch.tensor(0), top_k=2)
    tensor([3., 2., -inf])
    """
    if top_k <= 0 and top_p >= 1:
        return logits
    drop = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        drop = logits < logits.topk(top_k, dim=-1).values[..., -1:]
    if top_p < 1:
        ascending, order = logits.masked_fill(drop, float("-inf")).sort(dim=-1)
        in_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        in_tail[..., -1] = False  # the most likely token always stays
        drop = drop | torch.zeros_like(drop).scatter(-1, order, in_tail)
    drop = drop.scatter(-1, keep_ids[..., None], False)
    return logits.masked_fill(drop, float("-inf"))


def token_log_probs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Log-probs [...] float32 of sampled tokens after temperature, top-k and top-p, from raw logits [..., V].

    >>> token_log_probs(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([-0.6931])
    """
    scaled = filter_logits(logits.float() / temperature, token_ids, top_k=top_k, top_p=top_p)
    selected = scaled.gather(-1, token_ids[..., None]).squeeze(-1)
    return selected - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy [...] float32 in nats of the next-token distribution at `temperature` (before top-k and top-p).

    >>> token_entropy(torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """
    return _entropy(logits.float() / temperature)


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


MAX_LOGITS_BYTES = 2**28
"""Size up to which probabilities stay for the backward pass; beyond it they are computed again. 256 MiB."""

CHUNK_BYTES = 2**24
"""Logits of one chunk that stays in a processor's cache while several operations read it: 16 MiB."""


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    with_entropy: bool = False,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies from hidden states, without all logits in memory: of `hidden @ weight.T + bias`.

    The gradient of a log-prob with respect to its logits is `(onehot - softmax) / temperature`. Chunks of tokens go
    through the output layer one after the other; their probabilities are kept for the backward pass where all of them
    fit into `max_logits_bytes`, and computed again otherwise. liger-kernel's fused kernel is used where it can be.

    `hidden` [n, D] are inputs of the output layer, `weight` [V, D] is its matrix (under autocast the product is in
    autocast's dtype), `token_ids` [n] int64 are the tokens that were sampled there.

    Returns: (log-probs [n] float32 with gradient, entropies [n] float32 in nats without, or None)

    >>> linear_log_probs(torch.ones(1, 3), torch.zeros(2, 3), torch.tensor([1]), with_entropy=True)
    (tensor([-0.6931]), tensor([0.6931]))
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def chunked(
        hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        settings = (temperature, top_k, top_p, with_entropy)
        log_probs, entropy = _LinearLogProbs.apply(hidden, weight, bias, token_ids, settings, max_logits_bytes, dtype)
        return log_probs, entropy if with_entropy else None

    way = chunked
    if bias is None and top_k == 0 and top_p == 1 and _can_fuse(hidden, dtype):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if _is_right(chunked, hidden, weight, token_ids, temperature):
            way = _fused_log_probs
    return way(hidden, weight, token_ids, temperature=temperature, with_entropy=with_entropy)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        settings: tuple[float, int, float, bool],
        max_bytes: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        temperature, top_k, top_p, with_entropy = settings
        tokens, row_bytes = len(hidden), 4 * len(weight)
        keep = tokens * row_bytes <= max_bytes
        # Half of the limit, because a chunk and its gradient exist together.
        size = max(1, min(CHUNK_BYTES if keep else max_bytes // 4, max_bytes) // row_bytes)
        chunks = [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]
        log_probs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs if with_entropy else log_probs[:0])
        kept = None
        if keep and any(ctx.needs_input_grad):
            kept = torch.empty(tokens, len(weight), dtype=torch.float32, device=hidden.device)
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for part in chunks:
            logits = _logits(hidden[part].to(dtype), cast_weight, cast_bias, temperature)
            if with_entropy:
                entropy[part] = _entropy(logits)
            logits = filter_logits(logits, token_ids[part], top_k=top_k, top_p=top_p)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            log_probs[part] = (logits.gather(-1, token_ids[part, None]) - normaliser).squeeze(-1)
            if kept is not None:
                torch.exp(logits.sub_(normaliser), out=kept[part])
        ctx.save_for_backward(hidden, weight, bias, token_ids, kept)
        ctx.settings, ctx.chunks, ctx.dtype = settings, chunks, dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, token_ids, kept = ctx.saved_tensors
        temperature, top_k, top_p, _with_entropy = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if needs_bias else None
        cast_weight, cast_bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        for part in ctx.chunks:
            inputs = hidden[part].to(ctx.dtype)
            if kept is None:
                logits = _logits(inputs, cast_weight, cast_bias, temperature)
                logits = filter_logits(logits, token_ids[part], top_k=top_k, top_p=top_p)
                probs = torch.softmax(logits, dim=-1)
            else:
                probs = kept[part]
            scale = grad[part, None] / temperature
            grad_logits = probs * -scale
            grad_logits.scatter_add_(-1, token_ids[part, None], scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad_logits @ cast_weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad_logits.T @ inputs
        grads, parameters = (grad_hidden, grad_weight, grad_bias), (hidden, weight, bias)
        cast = (None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
        return (*cast, None, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[chunk, V] float32 at `temperature`, a new tensor."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


HOPPER = (9, 0)
"""Its compute capability. For other GPUs liger-kernel itself falls back to chunks of logits, as we do."""
CHECKED_TOKENS = 64
RELATIVE_ERROR = 0.05
"""Of bfloat16, which has eight bits, after two matrix products."""


def _fused_log_probs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`linear_log_probs` of bfloat16 in one kernel: neither logits nor probabilities are written to memory."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Kernel

    ignored, tiles = -100, 1
    result = Kernel.apply(hidden.contiguous(), weight, token_ids, float(temperature), ignored, tiles, with_entropy)
    loss, entropy = result if with_entropy else (result, None)
    return -loss.float(), None if entropy is None else entropy.detach().float()


def _can_fuse(hidden: Tensor, dtype: torch.dtype) -> bool:
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


LogProbs = Callable[..., Any]
_right: dict[tuple[Any, ...], bool] = {}


def _is_right(chunked: LogProbs, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> bool:
    """Check the fused kernel on some tokens, once for each shape: on untried ones it is at times wrong."""
    shape = (hidden.device, weight.shape, temperature)
    if shape not in _right:
        # Up to the rounding of bfloat16 the results are to be equal.
        ours, fused = (_trial(way, hidden, weight, token_ids, temperature) for way in (chunked, _fused_log_probs))
        pairs = [(a.float(), b.float()) for a, b in zip(ours, fused, strict=True)]
        _right[shape] = all((a - b).norm() <= RELATIVE_ERROR * a.norm() for a, b in pairs)
        if not _right[shape]:
            warnings.warn(
                f"liger-kernel's log-probs or gradients are not ours for an output layer of {tuple(weight.shape)} on "
                f"{torch.cuda.get_device_name(hidden.device)}: its kernel is not used.",
                stacklevel=2,
            )
    return _right[shape]


def _trial(way: LogProbs, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> list[Tensor]:
    """Log-probs, entropies and gradients of tokens that count differently."""
    # Copies, made outside inference mode: the first use can be in an evaluation, whose tensors autograd does not take.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = hidden[:CHECKED_TOKENS].detach().clone().requires_grad_()
        layer = weight.detach().clone().requires_grad_()
        ids = token_ids[:CHECKED_TOKENS].clone()
        log_probs, entropy = way(inputs, layer, ids, temperature=temperature, with_entropy=True)
        worth = torch.linspace(-1, 2, len(inputs), device=hidden.device)
        gradients = torch.autograd.grad(log_probs, [inputs, layer], worth)
    return [log_probs.detach(), entropy, *gradients]
