"""Log-probs of sampled tokens from hidden states, without ever holding the `[tokens, V]` logits."""

from typing import Any

import torch
from torch import Tensor

from tealightning.functional.fused_log_probs import can_fuse, fused_log_probs, is_right
from tealightning.functional.log_probs import filter_logits

MAX_LOGITS_BYTES = 2**28
"""Up to this size the probabilities are kept for the backward pass, beyond it they are computed again: 256 MiB."""

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
    """`token_log_probs` and `token_entropy` of `hidden @ weight.T + bias`, in memory that tokens x V do not decide.

    The gradient of a log-prob with respect to its logits is `(onehot - softmax) / temperature`. Chunks of tokens go
    through the output layer one after the other; their probabilities are kept for the backward pass where all of them
    fit into `max_logits_bytes`, and computed again otherwise. Where liger-kernel's fused kernel can be used, it is
    (`functional/fused_log_probs.py`).

    Args:
        hidden: [n, D], inputs of the output layer at n positions.
        weight: [V, D] of the output layer; under autocast the product is computed in autocast's dtype.
        token_ids: [n] int64, the tokens that were sampled there.
        bias: [V].
        with_entropy: Compute entropies too.
        max_logits_bytes: Memory for logits or probabilities.

    Returns:
        (log-probs [n] float32 with gradient, entropies [n] float32 in nats without, or None)
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def chunked(
        hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        chunking = _Chunking(len(hidden), len(weight), max_logits_bytes)
        settings = (temperature, top_k, top_p, with_entropy)
        log_probs, entropy = _LinearLogProbs.apply(hidden, weight, bias, token_ids, settings, chunking, dtype)
        return log_probs, entropy if with_entropy else None

    way = chunked
    if bias is None and top_k == 0 and top_p == 1 and can_fuse(hidden, dtype):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if is_right(chunked, hidden, weight, token_ids, temperature):
            way = fused_log_probs
    return way(hidden, weight, token_ids, temperature=temperature, with_entropy=with_entropy)


class _Chunking:
    """How n tokens are cut: `keep` tells if all probabilities together are small enough to be kept."""

    def __init__(self, tokens: int, vocabulary: int, max_bytes: int) -> None:
        row_bytes = 4 * vocabulary
        self.keep = tokens * row_bytes <= max_bytes
        # Half of the limit, because a chunk and its gradient exist together.
        size = max(1, min(CHUNK_BYTES if self.keep else max_bytes // 4, max_bytes) // row_bytes)
        self.slices = [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        settings: tuple[float, int, float, bool],
        chunking: _Chunking,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        with_entropy = settings[3]
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs if with_entropy else log_probs[:0])
        kept = None
        if chunking.keep and any(ctx.needs_input_grad):
            kept = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for part in chunking.slices:
            logits = _logits(hidden[part].to(dtype), cast_weight, cast_bias, settings[0])
            if with_entropy:
                entropy[part] = _entropy(logits)
            logits = filter_logits(logits, token_ids[part], top_k=settings[1], top_p=settings[2])
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            log_probs[part] = (logits.gather(-1, token_ids[part, None]) - normaliser).squeeze(-1)
            if kept is not None:
                torch.exp(logits.sub_(normaliser), out=kept[part])
        ctx.save_for_backward(hidden, weight, bias, token_ids, kept)
        ctx.settings, ctx.chunking, ctx.dtype = settings, chunking, dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, token_ids, kept = ctx.saved_tensors
        temperature, top_k, top_p, _entropy = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if needs_bias else None
        cast_weight, cast_bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        for part in ctx.chunking.slices:
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
        grads = (grad_hidden, grad_weight, grad_bias)
        parameters = (hidden, weight, bias)
        cast = (None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
        return (*cast, None, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[chunk, V] float32 at `temperature`, a new tensor."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _entropy(logits: Tensor) -> Tensor:
    """[chunk] float32, of the softmax of `logits`."""
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
