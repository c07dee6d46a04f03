"""Log-probs of sampled tokens under the distribution that they were sampled from."""

import torch
from torch import Tensor


def filter_logits(logits: Tensor, keep_ids: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits with everything outside top-k and then top-p set to -inf, as samplers do it.

    The sampled token always stays: rounding differences between engine and trainer can put a token of the edge on
    different sides, and its log-prob must stay finite.

    Args:
        logits: [..., V], temperature applied.
        keep_ids: [...] int64, the sampled tokens.
        top_k: Keep the k largest (ties at the k-th stay); 0 = all.
        top_p: Keep the smallest set of largest probabilities that sums to at least `top_p`; 1 = all.
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
    """`log p(token)` after temperature, top-k and top-p.

    Args:
        logits: [..., V] raw model output, any float dtype (computed in float32).
        token_ids: [...] int64.

    Returns:
        [...] float32.
    """
    scaled = filter_logits(logits.float() / temperature, token_ids, top_k=top_k, top_p=top_p)
    selected = scaled.gather(-1, token_ids[..., None]).squeeze(-1)
    return selected - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next-token distribution at `temperature` (before top-k and top-p).

    Args:
        logits: [..., V].

    Returns:
        [...] float32.
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
