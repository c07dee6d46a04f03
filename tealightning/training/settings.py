"""Checks of `PostTrainingModule`'s settings, before anything is loaded."""

import warnings

from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.training.loss import PolicyGradientLoss


def check_settings(
    advantage_scale: str,
    inner_epochs: int,
    micro_batch_tokens: int | None,
    micro_batch_size: int | None,
    gradient_clip_norm: float | None,
) -> None:
    """
    Raises:
        ValueError: for a setting out of range.
    """
    if advantage_scale not in ("none", "batch_rms"):
        raise UserError(f"advantage_scale must be none or batch_rms, got {advantage_scale!r}.")
    if inner_epochs < 1:
        raise UserError(f"inner_epochs must be at least 1, got {inner_epochs}.")
    if micro_batch_tokens is not None and micro_batch_tokens < 1:
        raise UserError(f"micro_batch_tokens must be at least 1 or null, got {micro_batch_tokens}.")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be at least 1 or null, got {micro_batch_size}.")
    if gradient_clip_norm is not None and not gradient_clip_norm > 0:
        raise UserError(f"gradient_clip_norm must be above 0 or null, got {gradient_clip_norm}.")


def check_correction(
    correction: str, estimator: AdvantageEstimator, loss: PolicyGradientLoss | None, inner_epochs: int
) -> None:
    """
    Raises:
        ValueError: if inner epochs cannot be corrected in this way.
    """
    if correction not in ("clip", "exact"):
        raise UserError(f"inner_epoch_correction must be clip or exact, got {correction!r}.")
    if correction == "clip":
        return
    if not estimator.has_off_policy_form:
        raise UserError(
            "inner_epoch_correction=exact needs an estimator with an off-policy form (max_at_k with scale=none), "
            f"got {estimator!r}."
        )
    if loss is not None and loss.importance_cap is not None:
        raise UserError(
            "inner_epoch_correction=exact and loss.importance_cap both correct ratios: set one of them only."
        )
    if inner_epochs == 1:
        warnings.warn("model.inner_epoch_correction=exact has no effect with inner_epochs=1.", stacklevel=3)
