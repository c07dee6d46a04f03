"""Micro-batches of rollouts: how a batch is split, and the share of the loss of a part."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from tealightning.checks import check_choice, check_not_negative, check_positive, check_share
from tealightning.errors import UserError
from tealightning.functional import losses
from tealightning.types import CompletionScores, StepBatch


def tokens_of_a_pass(device: torch.device) -> int:
    """Padded tokens of a forward pass that suit a device: a GPU wants many; on a CPU, passes whose activations stay in
    its caches are a quarter faster and more."""
    return 2_048 if device.type == "cpu" else 16_384


def split_rows(
    prompt_lengths: Tensor, completion_lengths: Tensor, rows: Tensor, *, max_tokens: int, max_rows: int | None = None
) -> list[Tensor]:
    """Partition `rows` [R] of a batch (lengths [B]) into micro-batches of at most `max_tokens` padded tokens.

    Sorting by length keeps padding low; longest first makes an out-of-memory error come at the start of a step. Prompts
    are padded on the left and completions on the right, so a micro-batch has its rows times (its longest prompt + its
    longest completion) tokens; a longer single rollout gets one of its own.
    """
    if len(rows) == 0:
        return []
    ordered = rows[(prompt_lengths + completion_lengths)[rows].argsort(descending=True, stable=True)]
    sizes: list[int] = []
    width = length = 0
    for prompt, completion in zip(prompt_lengths[ordered].tolist(), completion_lengths[ordered].tolist(), strict=True):
        width, length = max(width, prompt), max(length, completion)
        if sizes and (sizes[-1] + 1) * (width + length) <= max_tokens and sizes[-1] != max_rows:
            sizes[-1] += 1
        else:
            sizes.append(1)
            width, length = prompt, completion
    return list(ordered.split(sizes))


# ---------------------------------------------------------------- rollouts that share their prompts

KEYS_AND_VALUES = 0.1
"""Memory of a token's keys and values, which a row of a pass has of its prompt as well, as a share of the memory of the
activations of a token that is computed: 0.05 to 0.12 for Llamas of 0.1 to 70 B parameters."""

OVERHEAD = 1 / 16
"""What a pass costs beside its tokens, as a share of the tokens that it may have."""


def pass_tokens(num_prompts: int, prompt: int, num_rows: int, completion: int) -> float:
    """Size of a pass over `num_rows` completions of `num_prompts` prompts, of these lengths: the tokens that it
    computes (the last of a completion is not) and the keys and values of all rows, in tokens of a plain pass."""
    computed = num_prompts * prompt + num_rows * max(1, completion - 1)
    return (computed + KEYS_AND_VALUES * num_rows * (prompt + completion)) / (1 + KEYS_AND_VALUES)


@dataclass(kw_only=True, slots=True)
class _Part:
    """Rollouts of one pass, or a part of a group."""

    num_prompts: int
    prompt: int  # longest length
    completion: int  # longest length
    rows: list[int]

    @property
    def tokens(self) -> float:
        return pass_tokens(self.num_prompts, self.prompt, len(self.rows), self.completion)

    def __add__(self, other: "_Part") -> "_Part":
        return _Part(
            num_prompts=self.num_prompts + other.num_prompts,
            prompt=max(self.prompt, other.prompt),
            completion=max(self.completion, other.completion),
            rows=self.rows + other.rows,
        )


def split_groups(
    prompt_of: Tensor,
    prompt_lengths: Tensor,
    completion_lengths: Tensor,
    rows: Tensor,
    *,
    max_tokens: int,
    max_rows: int | None = None,
) -> list[Tensor]:
    """Partition `rows` [R] of a batch (lengths [B]) into micro-batches of at most `max_tokens` as `pass_tokens` counts
    them, in which a prompt is computed once: rollouts with the same number in `prompt_of` [R] have the same one.

    A group is cut where it does not fit, or where computing its prompt once more costs less than padding its short
    completions. Parts of like lengths go together, longest first, so that an out-of-memory error comes at the start of
    a step. A longer single rollout gets a micro-batch of its own.
    """
    groups: dict[int, list[tuple[int, int, int]]] = {}
    lengths = (prompt_lengths[rows].tolist(), completion_lengths[rows].tolist())
    for key, row, prompt, completion in zip(prompt_of.tolist(), rows.tolist(), *lengths, strict=True):
        groups.setdefault(key, []).append((completion, prompt, row))
    parts = [part for group in groups.values() for part in _cut(group, max_tokens, max_rows)]
    packed: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.completion, part.prompt), reverse=True):
        both = packed[-1] + part if packed else None
        if (
            both is not None
            and both.tokens <= min(max_tokens, packed[-1].tokens + part.tokens + OVERHEAD * max_tokens)
            and (max_rows is None or len(both.rows) <= max_rows)
        ):
            packed[-1] = both
        else:
            packed.append(part)
    return [torch.tensor(part.rows, device=rows.device) for part in packed]


def _cut(group: Sequence[tuple[int, int, int]], max_tokens: int, max_rows: int | None) -> list[_Part]:
    """The parts of a group (completion length, prompt length, row) that compute the fewest tokens in all, found by
    dynamic programming over the rows, longest completion first."""
    group = sorted(group, key=lambda row: -row[0])
    count, prompt = len(group), group[0][1]
    completions = np.array([completion for completion, _, _ in group])
    fixed = pass_tokens(1, prompt, 0, 1)
    each = np.array([pass_tokens(1, prompt, 1, length) - fixed for length in completions.tolist()])
    most = np.clip((max_tokens - fixed) / each, 1, max_rows or count).astype(int)
    least, first_of = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        sizes = end - np.arange(end)
        # The square is too small to decide anything but between equals: of those it makes the parts even.
        tokens = least[:end] + prompt + sizes * completions[:end] + 1e-6 * sizes**2
        tokens[sizes > most[:end]] = np.inf
        first_of[end] = tokens.argmin()
        least[end] = tokens[first_of[end]]
    parts, end = [], count
    while end > 0:
        first = int(first_of[end])
        rows = [row for _, _, row in group[first:end]]
        parts.append(_Part(num_prompts=1, prompt=prompt, completion=group[first][0], rows=rows))
        end = first
    return parts


# ---------------------------------------------------------------- loss


@dataclass(kw_only=True, slots=True)
class PolicyGradientLoss:
    """The clipped policy-gradient loss with an optional KL penalty.

    Args:
        clip_lower: The ratio to the behaviour policy is clipped at 1 - clip_lower. With one inner epoch the ratio is 1
            and nothing is clipped.
        clip_upper: ... and at 1 + clip_upper.
        reduction: `token_mean`, `sequence_mean` or `constant` (see `functional.losses.token_weights`).
        constant: Tokens that `constant` divides by; None = sampling.max_new_tokens (Dr. GRPO), 1 = textbook sum.
        kl_coef: Weight of the KL penalty to the frozen reference; 0 loads no reference model.
        kl_estimator: `k1`, `k2` or `k3` (see `functional.losses.kl_estimate`).
        importance_cap: Upper bound of the importance ratios trainer / engine that weight the loss, which correct for
            log-probs that differ (rounding, rollouts of older weights); None = no correction.
        importance_mode: Whether the ratio is each `token`'s or the whole completion's (`sequence`), and whether one
            beyond a bound is set to the bound (`truncate`) or to 0 (`mask`): `token_truncate`, `token_mask`,
            `sequence_truncate` or `sequence_mask` (see `functional.losses.importance_weights`).
        importance_min: Lower bound of these ratios; 0 = none.
    """

    clip_lower: float = 0.2
    clip_upper: float = 0.2
    reduction: losses.Reduction = "token_mean"
    constant: float | None = None
    kl_coef: float = 0.0
    kl_estimator: losses.KLEstimator = "k3"
    importance_cap: float | None = None
    importance_mode: losses.ImportanceMode = "token_truncate"
    importance_min: float = 0.0

    def __post_init__(self) -> None:
        check_share("loss.clip_lower", self.clip_lower)
        check_not_negative("loss.kl_coef", self.kl_coef)
        check_choice("loss.reduction", self.reduction, get_args(losses.Reduction))
        check_choice("loss.kl_estimator", self.kl_estimator, get_args(losses.KLEstimator))
        check_choice("loss.importance_mode", self.importance_mode, get_args(losses.ImportanceMode))
        check_not_negative("loss.importance_min", self.importance_min)
        for name, value in (("clip_upper", self.clip_upper), ("importance_cap", self.importance_cap)):
            if value is not None and not value > 0:
                raise UserError(f"loss.{name} must be above 0, got {value}.")
        if self.importance_cap is None:
            for name in ("importance_mode", "importance_min"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    warnings.warn(f"loss.{name} has no effect without loss.importance_cap.", stacklevel=3)
        elif self.importance_min >= self.importance_cap:
            raise UserError(
                f"loss.importance_min must be below loss.importance_cap ({self.importance_cap}), got "
                f"{self.importance_min}."
            )
        if self.constant is not None:
            check_positive("loss.constant", self.constant)
            if self.reduction != "constant":
                warnings.warn(f"loss.constant has no effect with reduction={self.reduction!r}.", stacklevel=3)


def micro_batch_loss(
    settings: PolicyGradientLoss, step: StepBatch, chosen: Tensor, scores: CompletionScores
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the batch loss of the rollouts `chosen` [rows], a scalar with gradient, and what the metrics need of
    them: sums over tokens, or maxima where a name ends in `_max`. `scores` have entropies on the first pass over a
    batch only.
    """
    policy_log_probs, mask = scores.log_probs, scores.mask
    here = (chosen, slice(mask.shape[1]))
    rollout_log_probs = step.rollouts.rollout_log_probs[here]
    behaviour = policy_log_probs.detach() if step.behaviour_log_probs is None else step.behaviour_log_probs[here]
    token_loss, clipped = losses.clipped_policy_loss(
        policy_log_probs,
        behaviour,
        step.advantages[chosen].to(policy_log_probs.dtype),
        clip_lower=settings.clip_lower,
        clip_upper=settings.clip_upper,
    )
    outside = torch.zeros_like(clipped)
    if settings.importance_cap is not None:
        ratios, outside = losses.importance_weights(
            behaviour,
            rollout_log_probs,
            mask,
            settings.importance_mode,
            lower=settings.importance_min,
            upper=settings.importance_cap,
        )
        token_loss = token_loss * ratios
    weights = losses.token_weights(
        mask,
        settings.reduction,
        num_tokens=step.num_tokens,
        num_sequences=step.num_sequences,
        constant=float(settings.constant or step.rollouts.sampling.max_new_tokens),
    )
    loss = (weights * token_loss).sum()
    sums = {"policy_loss": loss.detach(), "tokens": mask.sum()}
    sums |= {"clipped": (clipped & mask).sum(), "outside": (outside & mask).sum()}
    if scores.entropy is not None:
        mismatch = (policy_log_probs.detach() - rollout_log_probs).abs().masked_fill(~mask, 0.0)
        sums |= {"entropy": scores.entropy.sum(), "mismatch": mismatch.sum(), "mismatch_max": mismatch.max()}
    if step.ref_log_probs is not None:
        ref_log_probs = step.ref_log_probs[here]
        penalty = losses.kl_penalty(policy_log_probs, ref_log_probs, settings.kl_estimator)
        loss = loss + settings.kl_coef * (weights * penalty).sum()
        kl = losses.kl_estimate(policy_log_probs.detach() - ref_log_probs, settings.kl_estimator)
        sums["kl"] = (kl * mask).sum()
    return loss, sums


def merge_sums(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add a micro-batch's sums to the step's, in place; maxima stay maxima."""
    for key, value in part.items():
        value = value.float()
        if key in total:
            value = torch.maximum(total[key], value) if key.endswith("_max") else total[key] + value
        total[key] = value
