"""Which models can compute a prompt once for all of its completions: each is tried on the first batch that it sees."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tealightning.training.padding import reads_padding
from tealightning.training.scoring import CannotContinue, score_completions
from tealightning.types import RolloutBatch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Mean difference of log-probs in nats, and of the gradient relative to its norm, that rounding may make; 0.2 in other
data types."""

Backward = Callable[[Tensor], Any]


_CAN: "weakref.WeakKeyDictionary[Any, dict[bool, bool]]" = weakref.WeakKeyDictionary()
"""Of each model that was tried, without and with its gradients, whether it can."""


def can_share_prompts(
    model: Any,
    rollouts: RolloutBatch,
    *,
    max_tokens: int,
    backward: Backward | None = None,
    over_ranks: Callable[[float], float] = lambda value: value,
) -> bool:
    """Whether `model` gives the same when it computes the prompts of `rollouts` once for all of their completions.

    Recurrent states, caches that lose something, recomputed activations, masks without the prompt: a model whose
    log-probs or gradients differ, whatever the reason, keeps to the plain pass, with a warning that tells it. A model
    is tried once, on the first batch that it sees; ranks that share it call this together.

    Args:
        max_tokens: Padded tokens of a pass of the trial.
        backward: Propagates the trial's loss back; None = the model is not trained, and only log-probs count. There are
            no gradients afterwards.
        over_ranks: The largest of a number of each rank that shares the model.
    """
    if rollouts.group_size == 1:
        return False
    known, is_trained = _CAN.setdefault(model, {}), backward is not None
    if is_trained not in known:
        reason = _reason_against(model, trial_rollouts(rollouts, max_tokens), backward)
        known[is_trained] = not over_ranks(float(reason != ""))
        if not known[is_trained]:
            name = type(getattr(model, "policy", model)).__name__
            rank_zero_warn(
                f"Prompts are computed anew for each of their rollouts and not once a group with {name}: "
                f"{reason or 'on another rank its results differ'}."
            )
    return known[is_trained]


def trial_rollouts(rollouts: RolloutBatch, max_tokens: int) -> RolloutBatch:
    """Two rollouts each of the longest and of the shortest prompt of a batch, cut so that neither all prompts nor all
    completions are equally long, and that a pass of `max_tokens` has room for them."""
    m = rollouts.group_size
    prompts, lengths = rollouts.prompt_lengths.view(-1, m)[:, 0], rollouts.completion_lengths.view(-1, m)
    groups = torch.stack([prompts.argmax(), prompts.argmin()])
    rows = (groups[:, None] * m + lengths[groups].argsort(dim=1, descending=True)[:, :2]).flatten()
    completion_lengths = rollouts.completion_lengths[rows].clamp(max=max(2, max_tokens // 8))
    completion_lengths[1::2] = completion_lengths[1::2].clamp(max=max(1, int(completion_lengths.max()) // 2))
    longest = max(2, max_tokens // 4 - int(completion_lengths.max()))
    prompt_lengths = rollouts.prompt_lengths[rows].clamp(max=longest)
    prompt_lengths[2:] = prompt_lengths[2:].clamp(max=max(1, int(prompt_lengths[0]) // 2))
    return replace(
        rollouts,
        prompt_ids=rollouts.prompt_ids[rows],
        prompt_lengths=prompt_lengths,
        completion_ids=rollouts.completion_ids[rows],
        completion_lengths=completion_lengths,
        rollout_log_probs=rollouts.rollout_log_probs[rows],
        truncated=rollouts.truncated[rows],
        rewards=torch.zeros(2, 2, dtype=torch.float64, device=rows.device),
        reward_components={},
        completions=[],
    )


def _reason_against(model: Any, rollouts: RolloutBatch, backward: Backward | None) -> str:
    """Why `model` cannot share prompts; empty if it can."""
    if hasattr(model, "_orig_mod"):
        return "it is compiled, and would be compiled anew for every pair of lengths"
    if reads_padding(model):
        return "it keeps a state of its own and no key-value cache"
    try:
        (plain, gradients), (shared, others) = (_trial(model, rollouts, share, backward) for share in (False, True))
    except CannotContinue as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    # Models fail at caches in many ways; what the plain pass has raised comes again.
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        if backward is not None:
            model.zero_grad(set_to_none=True)
    device = rollouts.prompt_ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return _difference(plain, gradients, shared, others, TOLERANCE.get(dtype, 0.2))


def _trial(model: Any, rollouts: RolloutBatch, share: bool, backward: Backward | None) -> tuple[Tensor, list[Tensor]]:
    """Log-probs [tokens] and gradients, this rank's shards of them."""
    rows = torch.arange(len(rollouts.prompt_ids), device=rollouts.prompt_ids.device)
    with torch.set_grad_enabled(backward is not None):
        scores = score_completions(model, rollouts, rows, share_prompts=share)
        if backward is None:
            return scores.log_probs[scores.mask], []
        # Every row counts differently, so that none can stand for another.
        worth = torch.linspace(-1, 2, len(rows), device=rows.device)[:, None]
        backward((worth * scores.log_probs).sum())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return scores.log_probs.detach()[scores.mask], [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _difference(plain: Tensor, gradients: list[Tensor], shared: Tensor, others: list[Tensor], tolerance: float) -> str:
    nats = float((plain - shared).abs().mean())
    if not nats <= tolerance:
        return f"its log-probs then differ by {nats:.2g} nats, and rounding explains {tolerance:g}"
    if len(gradients) != len(others):
        return "its gradient then lacks parameters"
    norms = [(float((a - b).norm()), float(a.norm())) for a, b in zip(gradients, others, strict=True)]
    apart, whole = (sum(norm**2 for norm in each) ** 0.5 for each in zip(*norms, strict=True)) if norms else (0.0, 1.0)
    if not apart <= tolerance * whole:
        return f"its gradient then differs by {apart / whole:.2g} of its norm, and rounding explains {tolerance:g}"
    return ""
