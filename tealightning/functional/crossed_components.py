"""Variance components of seeds and prompts: two-way analysis of variance."""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SEED_SHARE = 0.05  # of the residual mean square: seed means that agree by chance are no proof of precision
FILL_STEPS = 1000


@dataclass(kw_only=True, slots=True)
class Components:
    """Means of C columns over seeds and prompts, with the parts of their variance."""

    mean: Tensor  # [C] float64
    seed_variance: Tensor  # [C] float64, the part of Var(mean) that more seeds would lower; holds the residual's
    prompt_variance: Tensor  # [C] float64, the part that only more prompts would lower
    degrees_of_freedom: Tensor  # [C] float64
    prompt_effects: Tensor  # [Q, C] float64, prompt means less the mean


def crossed_components(values: Tensor, missing: int = 0) -> Components:
    """Moment estimates of the variance of a grand mean, for `y_sq = mu + a_s + b_q + e_sq`.

        Var(mean) = var_a/S + var_b/Q + var_e/(SQ),  estimated by  (MS_seeds + max(MS_prompts - MS_residual, 0)) / (SQ)

    The first term is what a t interval over the seeds' means uses, so the interval of `crossed_interval` keeps
    its coverage however small the seeds' own variance is. (Clipping the seeds' component at 0 too would pretend to know
    from 3 seeds that it is 0: coverage 87% where it is not.)

        1/df = (V_seeds / (S-1) + V_prompts / (Q-1)) / (V_seeds + V_prompts)

    Satterthwaite (1946) squares the two shares, which is liberal when S is 3 (92%) because the shares are estimates.

    Args:
        values: [S, Q, C] float64 without NaN.
        missing: How many cells were filled in; each takes a degree of freedom from the residual.

    Returns:
        See `Components`; variance and degrees of freedom NaN where S = Q = 1. One seed (or prompt): its variance part
        is 0.
    """
    seeds, prompts = values.shape[:2]
    origin = values[0, 0]
    shifted = values - origin  # constants give exactly 0
    mean = shifted.mean(dim=(0, 1))
    seed_effects, prompt_effects = shifted.mean(dim=1) - mean, shifted.mean(dim=0) - mean
    residual = shifted - mean - seed_effects[:, None] - prompt_effects
    residual_square = residual.square().sum(dim=(0, 1)) / max((seeds - 1) * (prompts - 1) - missing, 1)
    seed_square = prompts * seed_effects.square().sum(dim=0) / max(seeds - 1, 1)
    prompt_square = seeds * prompt_effects.square().sum(dim=0) / max(prompts - 1, 1)
    cells = seeds * prompts if max(seeds, prompts) > 1 else float("nan")
    seed_variance = torch.maximum(seed_square, MIN_SEED_SHARE * residual_square) / cells
    prompt_variance = (prompt_square - residual_square).clamp(min=0) / cells
    total = seed_variance + prompt_variance
    per_seed, per_prompt = seed_variance / max(seeds - 1, 1), prompt_variance / max(prompts - 1, 1)
    degrees = (total / (per_seed + per_prompt)).masked_fill(total == 0, 1.0)
    return Components(
        mean=origin + mean,
        seed_variance=seed_variance,
        prompt_variance=prompt_variance,
        degrees_of_freedom=degrees,
        prompt_effects=prompt_effects,
    )


def drop_and_fill(values: Tensor) -> tuple[Tensor, int]:
    """Leaves out seeds and prompts without any value, and fills other missing cells with `mu + a_s + b_q`.

    The fill is the fixed point of "fit the additive model to the filled table, read the missing cells off it", which is
    least squares on the present cells (Yates 1933).

    Args:
        values: [S, Q] float64, NaN = missing.

    Returns:
        [S', Q'] without NaN (of 0 elements if all were missing), and the number of cells that were filled.
    """
    present = ~values.isnan()
    values = values[present.any(dim=1)][:, present.any(dim=0)]
    missing = values.isnan()
    if not bool(missing.any()):
        return values, 0
    filled = torch.where(missing, values.nanmean(), values)
    for _ in range(FILL_STEPS):
        fit = filled.mean(dim=1, keepdim=True) + filled.mean(dim=0) - filled.mean()
        updated = torch.where(missing, fit, values)
        step = (updated - filled).abs().max()
        filled = updated
        if step <= 1e-12 * filled.abs().max():
            break
    return filled, int(missing.sum())
