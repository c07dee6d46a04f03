"""Means and differences over prompts and seeds: standard errors, crossed bootstrap, variance components.

Samples of one prompt share its difficulty, so counting them as independent would understate the error: every
function here takes one value a prompt. Results are float64, with one entry for each of C columns.
"""

from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor


class MeanEstimate(NamedTuple):
    """A mean over prompts."""

    mean: Tensor  # NaN without prompts
    standard_error: Tensor  # NaN with fewer than 2 prompts
    num_prompts: Tensor  # int64, prompts that counted


def mean_over_prompts(values: Tensor) -> MeanEstimate:
    """Mean and standard error `std (ddof 1) / sqrt(prompts)` of [Q] or [Q, C] over prompts; NaN ones are left out.

    >>> [round(value.item(), 3) for value in mean_over_prompts(torch.tensor([1.0, 2.0, 3.0, float("nan")]))]
    [2.0, 0.577, 3]
    """
    values = values.double()
    counted = ~values.isnan()
    num_prompts = counted.sum(dim=0)
    count = num_prompts.double()
    mean = values.masked_fill(~counted, 0.0).sum(dim=0) / count  # 0/0 = NaN without prompts
    squares = (values - mean).masked_fill(~counted, 0.0).square().sum(dim=0)
    variance = squares / (count - 1).masked_fill(num_prompts < 2, float("nan"))
    return MeanEstimate(mean, (variance / count).sqrt(), num_prompts)


def paired_difference(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> MeanEstimate:
    """Mean of `after - before` over the prompts that both have values of, with its standard error.

    Pairing removes the spread between prompts, usually the larger part of either mean's error. Each is (keys [Q] int64,
    values [Q] or [Q, C]) as `BestOfN.per_prompt` returns; prompts may come in another order, or be others.

    Raises: ValueError if keys repeat or the values have different numbers of columns.

    >>> keys = torch.tensor([7, 8])
    >>> before, after = (keys, torch.tensor([1.0, 2.0])), (keys.flip(0), torch.tensor([4.0, 2.0]))
    >>> [value.item() for value in paired_difference(before, after)]
    [1.5, 0.5, 2]
    """
    for name, (keys, values) in (("before", before), ("after", after)):
        if len(keys) != len(values) or keys.unique().numel() != len(keys):
            raise ValueError(f"{name} must have one value for each key and no key twice (average a prompt's first).")
    if before[1].shape[1:] != after[1].shape[1:]:
        raise ValueError(
            f"before and after must hold the same columns, got {tuple(before[1].shape)} and {tuple(after[1].shape)}."
        )
    common = []
    for (keys, values), (others, _) in ((before, after), (after, before)):
        shared = torch.isin(keys, others)
        common.append(values.double()[shared][keys[shared].argsort()])
    return mean_over_prompts(common[1] - common[0])


MIN_SEED_SHARE = 0.05  # of the residual mean square: seed means that agree by chance are no proof of precision
FILL_STEPS = 1000


class Components(NamedTuple):
    """Means of C columns over seeds and prompts, with the parts of their variance."""

    mean: Tensor
    seed_variance: Tensor  # the part of Var(mean) that more seeds would lower; holds the residual's
    prompt_variance: Tensor  # the part that only more prompts would lower
    degrees_of_freedom: Tensor
    prompt_effects: Tensor  # [Q, C], prompt means less the mean


def crossed_components(values: Tensor, missing: int = 0) -> Components:
    """Moment estimates of the variance of a grand mean of `values` [S, Q, C], for `y_sq = mu + a_s + b_q + e_sq`.

        Var(mean) = var_a/S + var_b/Q + var_e/(SQ),  estimated by  (MS_seeds + max(MS_prompts - MS_residual, 0)) / (SQ)

    The first term is what a t interval over the seeds' means uses, so the interval of `crossed_interval` keeps
    its coverage however small the seeds' own variance is. (Clipping the seeds' component at 0 too would pretend to know
    from 3 seeds that it is 0: coverage 87% where it is not.)

        1/df = (V_seeds / (S-1) + V_prompts / (Q-1)) / (V_seeds + V_prompts)

    Satterthwaite (1946) squares the two shares, which is liberal when S is 3 (92%) because the shares are estimates.
    Each of the `missing` cells that were filled in takes a degree of freedom from the residual. One seed (or prompt):
    its variance part is 0. Variance and degrees of freedom are NaN where S = Q = 1.

    >>> parts = crossed_components(torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)[..., None])
    >>> parts.mean, parts.seed_variance, parts.prompt_variance
    (tensor([2.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64), tensor([0.7500], dtype=torch.float64))
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
    degrees_of_freedom = (total / (per_seed + per_prompt)).masked_fill(total == 0, 1.0)
    return Components(origin + mean, seed_variance, prompt_variance, degrees_of_freedom, prompt_effects)


def _drop_and_fill(values: Tensor) -> tuple[Tensor, int]:
    """Leave out seeds and prompts of [S, Q] without any value, and fill other missing cells with `mu + a_s + b_q`.

    The fill is the fixed point of "fit the additive model to the filled table, read the missing cells off it", which is
    least squares on the present cells (Yates 1933). Returns the table and how many cells were filled.
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


MIN_RESAMPLED = 8  # with fewer prompts too many resamples are a single prompt repeated
MIN_VARIANCE_RATIO = 0.25  # of a resample: one that misses the only unusual prompt would make the interval infinite


class Interval(NamedTuple):
    """Means of C columns with their uncertainty. NaN where a column has no value, or all but `mean` if it has one."""

    mean: Tensor
    low: Tensor
    high: Tensor
    standard_error: Tensor
    p_value: Tensor  # two-sided, of mean = 0


def crossed_interval(values: Tensor, *, confidence: float = 0.95, samples: int = 4000, seed: int = 0) -> Interval:
    """Interval of mu in `y_sq = mu + a_s + b_q + e_sq`, seeds and prompts crossed, by a studentised bootstrap.

        mean - t_df * r_+ * se  ..  mean + t_df * r_- * se,     se^2 = V_seeds + V_prompts (`crossed_components`)

    `df` widens for the few seeds; `r` corrects the shape for skewed prompt effects. It is a quantile of

        tau* = (sqrt(V_seeds) z + mean(b*)) / sqrt(V_seeds + V_prompts * var(b*)/var(b))

    over that of the t distribution which tau* has for normal effects (`r = 1`). `b*` are the prompts' effects, rescaled
    to `V_prompts * Q`, drawn with replacement; z is normal, because 3 to 10 seeds are too few to be resampled: a
    percentile bootstrap of them undercovers, and with cells resampled too (Owen's pigeonhole bootstrap) the residual
    variance counts three times. p-values use `t_df` of `mean / (r se)`: at most `1 - confidence` exactly where
    the interval excludes 0.

    Simulated coverage of 95% intervals with 3, 5 and 10 seeds and 24, 48 and 96 prompts, whichever variance dominates,
    effects of prompts and residuals normal or exponential: 93.4% to 96.8% (`make test-slow` repeats the corners).
    With 2 seeds it falls to 91%; where skewed (exponential) effects of seeds are all the variance there is, to 88%.

    Sources: Owen (2007), "The pigeonhole bootstrap"; Cameron, Gelbach and Miller (2011), "Robust inference with
    multiway clustering" (variances of crossed clusters add, minus the part counted twice); Hall (1988), studentising;
    Carpenter, Goldstein and Rasbash (2003), resampling of effects rescaled to their estimated variance.

    One seed: over prompts only, so the spread of seeds is not in it. One prompt: over seeds only, a t interval. Fewer
    than 8 prompts: `r = 1`. One cell: NaN but for the mean. Constant columns: an interval of width 0 and p-value 0, or
    1 where the constant is 0; for bounded values that is too sure.

    A missing cell of `values` [S, Q, C] is NaN. It is filled by the additive fit, so that each seed and prompt keeps
    its weight in the mean; a seed or prompt without any value in a column is left out of it. A ValueError for another
    shape, a confidence outside (0, 1), or fewer than 100 resamples.

    >>> values = torch.randn(3, 24, 1, generator=torch.Generator().manual_seed(0))
    >>> interval = crossed_interval(values + 1)
    >>> [round(value.item(), 2) for value in (interval.low, interval.mean, interval.high)]
    [0.63, 1.08, 1.53]
    """
    if values.ndim != 3:
        raise ValueError(f"values: expected [seeds, prompts, columns], got shape {tuple(values.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, such as 0.95, got {confidence}")
    if samples < 100:
        raise ValueError(f"samples: expected at least 100 bootstrap resamples, got {samples}")
    values = values.double().cpu()
    result = torch.full((5, values.shape[2]), float("nan"), dtype=torch.float64)
    complete = ~values.isnan().any(dim=0).any(dim=0)
    parts = [(complete, values[:, :, complete], 0)] if bool(complete.any()) else []
    for column in (~complete).nonzero()[:, 0].tolist():
        filled, missing = _drop_and_fill(values[:, :, column])
        parts.append((torch.tensor([column]), filled[:, :, None], missing))
    for where, cells, missing in parts:
        if cells.numel():
            result[:, where] = _interval(crossed_components(cells, missing), confidence, samples, seed)
    return Interval(*result)


def _interval(parts: Components, confidence: float, samples: int, seed: int) -> Tensor:
    """[5, C]: mean, low, high, standard error, p-value of columns without missing cells."""
    mean, error = parts.mean, (parts.seed_variance + parts.prompt_variance).sqrt()
    degrees = parts.degrees_of_freedom.numpy()
    critical = torch.from_numpy(stats.t.ppf((1 + confidence) / 2, degrees))
    shape_low, shape_high = _shape(parts, confidence, samples, seed)
    low, high = mean - critical * shape_high * error, mean + critical * shape_low * error
    score = mean.abs() / (error * torch.where(mean > 0, shape_high, shape_low))
    p_value = torch.from_numpy(2 * stats.t.sf(score.numpy(), degrees))
    p_value = torch.where(error == 0, (mean == 0).double(), p_value)
    return torch.stack([mean, low, high, error, p_value])


def _shape(parts: Components, confidence: float, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lower and upper quantile of tau* over that of a t distribution, both positive, each [C]."""
    effects, count = parts.prompt_effects, len(parts.prompt_effects)
    if count < MIN_RESAMPLED:
        return torch.ones_like(parts.mean), torch.ones_like(parts.mean)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (samples, count), generator=generator)
    counts = torch.zeros(samples, count, dtype=torch.float64)  # how often each resample holds each prompt
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    normal = torch.special.ndtri((torch.randperm(samples, generator=generator).double() + 0.5) / samples)  # stratified
    total = parts.seed_variance + parts.prompt_variance
    prompt_share = parts.prompt_variance / total.masked_fill(total == 0, 1.0)
    seed_share = 1 - prompt_share
    size = effects.square().mean(dim=0).sqrt()
    effects = effects / size.masked_fill(size == 0, 1.0)  # mean 0, mean square 1
    means = counts @ effects / count
    spread = (counts @ effects.square() / count - means.square()) * count / (count - 1)
    spread = spread.clamp(min=MIN_VARIANCE_RATIO)
    scores = seed_share.sqrt() * normal[:, None] + (prompt_share * count).sqrt() * means
    scores = scores / (seed_share + prompt_share * spread).sqrt()
    tail = (1 - confidence) / 2
    level = max((tail * samples - 0.5) / (samples - 1), 0.0)  # the i-th smallest stands at (i - 1/2) / samples
    quantiles = torch.quantile(scores, scores.new_tensor([level, 1 - level]), dim=0)
    known_seeds = (count - 1) / prompt_share.clamp(min=1e-6).numpy()
    reference = torch.from_numpy(stats.t.ppf(1 - tail, known_seeds))
    # Of both signs in every sensible case; a shape that shrinks the interval to nothing is never right.
    low, high = (quantiles * torch.tensor([[-1.0], [1.0]]) / reference).clamp(min=0.5)
    return low, high
