"""Micro-batches of rollouts: how a batch is split, the log-probs of a part, and its share of the loss."""

import inspect
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tealightning.checks import check_choice, check_not_negative, check_positive, check_share
from tealightning.errors import UserError
from tealightning.functional import losses
from tealightning.functional.log_probs import linear_log_probs, token_entropy, token_log_probs
from tealightning.training.padding import padding_of, reads_padding, rolled
from tealightning.types import CompletionScores, RolloutBatch, SamplingConfig, StepBatch


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


# ---------------------------------------------------------------- log-probs


def score_completions(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False
) -> CompletionScores:
    """Log-probs of the sampled tokens under `model` and the rollouts' own sampling distribution.

    Masks and positions come from lengths, never from token ids; a prompt is never empty (the engine had to condition on
    something), so position `tp - 1` predicts the first sampled token of every row. Logits of all tokens never exist at
    once, except for models that change them after the output layer.
    """
    head = linear_head(model)
    scores = None if head is None else _score_in_head(model, head, rollouts, rows, with_entropy)
    return scores or score_through_logits(model, rollouts, rows, with_entropy=with_entropy)


def score_through_logits(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor, *, with_entropy: bool = False
) -> CompletionScores:
    """`score_completions` with all logits at once: for models that change them, and for hooks of the output layer."""
    inputs, targets, mask, padding = _model_inputs(model, rollouts, rows)
    logits = _at_targets(model(**inputs).logits, mask, padding)
    log_probs = token_log_probs(logits, targets, **_distribution(rollouts.sampling))
    scores = CompletionScores(log_probs=log_probs.masked_fill(~mask, 0.0), mask=mask)
    if with_entropy:
        with torch.no_grad():
            entropy = token_entropy(logits, temperature=rollouts.sampling.temperature)
        scores.entropy = entropy.masked_fill(~mask, 0.0)
    return scores


def trim(rollouts: RolloutBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` of the batch without the padding that only longer rollouts need: input_ids [rows, tp + t], attention_mask
    [rows, tp + t] bool and completion_mask [rows, t] bool."""
    width = max(1, int(rollouts.prompt_lengths[rows].max()))
    length = max(1, int(rollouts.completion_lengths[rows].max()))
    completion_mask = rollouts.completion_mask[rows][:, :length]
    input_ids = torch.cat([rollouts.prompt_ids[rows][:, -width:], rollouts.completion_ids[rows][:, :length]], dim=1)
    return input_ids, torch.cat([rollouts.prompt_mask[rows][:, -width:], completion_mask], dim=1), completion_mask


def _model_inputs(
    model: nn.Module, rollouts: RolloutBatch, rows: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor | None]:
    """Arguments of the model's forward pass, the targets [rows, t] with their mask, and by how much each row was moved
    to the left, so that all padding is on its right (None = not at all): for models that would read it."""
    input_ids, attention_mask, mask = trim(rollouts, rows)
    targets, padding = input_ids[:, -mask.shape[1] :], None
    if reads_padding(model):
        padding = padding_of(attention_mask)
        input_ids, attention_mask = rolled(input_ids, -padding), rolled(attention_mask, -padding)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted and padding is None:
        inputs["logits_to_keep"] = mask.shape[1] + 1
    return inputs, targets, mask, padding


def _at_targets(outputs: Tensor, mask: Tensor, padding: Tensor | None) -> Tensor:
    """[rows, t, ...] of a model's outputs [rows, t + 1 or more, ...] where it predicts the targets."""
    return (outputs if padding is None else rolled(outputs, padding))[:, -mask.shape[1] - 1 : -1]


def _distribution(sampling: SamplingConfig) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


_ALTERS_LOGITS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models found to do something to the output layer's result (a softcap, a scale) or not to call the layer at all."""


def linear_head(model: Any) -> nn.Linear | None:
    """The output layer if the logits are exactly what it returns, else None.

    Whether a model changes its logits afterwards is found out by scoring, not from lists of architectures.
    """
    if model in _ALTERS_LOGITS or hasattr(model, "_orig_mod"):  # torch.compile would compile anew at every call
        return None
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def _score_in_head(
    model: Any, head: nn.Linear, rollouts: RolloutBatch, rows: Tensor, with_entropy: bool
) -> CompletionScores | None:
    """Call the whole model, so that wrappers around it (FSDP, adapters, autocast) do their work, with a function in the
    place of its output layer that returns log-probs and not logits.

    None if the model did not pass them on as they were: they are worthless then, and the model is remembered.
    """
    inputs, targets, mask, padding = _model_inputs(model, rollouts, rows)
    made: list[CompletionScores] = []

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    def score(hidden: Tensor) -> Tensor:
        """[rows, t] from [rows, t + 1 or more, D], of which padding is left out."""
        log_probs, entropy = linear_log_probs(
            _at_targets(hidden, mask, padding)[mask],
            head.weight,
            targets[mask],
            bias=head.bias,
            with_entropy=with_entropy,
            **_distribution(rollouts.sampling),
        )
        entropies = None if entropy is None else padded(entropy)
        made.append(CompletionScores(log_probs=padded(log_probs), mask=mask, entropy=entropies))
        return made[-1].log_probs

    head.forward = score  # type: ignore[assignment, method-assign]
    try:
        result = model(**inputs).logits
    finally:
        del head.forward
    if len(made) == 1:
        scores = made[0]
        if result is scores.log_probs or (result.shape == mask.shape and result.equal(scores.log_probs)):
            return scores
    _ALTERS_LOGITS.add(model)
    return None


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
