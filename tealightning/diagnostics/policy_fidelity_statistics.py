"""Cross-fitted cosines and biases from per-prompt gradients of two halves, with a bootstrap over prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEP_PROMPTS = (1, 32, 256)
"""Prompts of a training step whose quality is reported."""
DRAWS = 2000
"""Bootstrap draws of the prompts."""


Figures = Callable[["Gradients", Tensor], dict[str, Tensor]]


class Estimate(NamedTuple):
    """A figure with its 95% interval; NaN where it has none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(kw_only=True, slots=True)
class Gradients:
    """Inner products of per-prompt gradients, all [Q, Q] float64 with prompts p, q, and the noise of one group.

    `G` is the oracle's, `E` the mean over the groups of an estimator, A and B the halves.
    """

    target: Tensor  # <G_A[p], G_B[q]>
    cross: Tensor  # (<E_A[p], G_B[q]> + <E_B[p], G_A[q]>)/2
    own: Tensor  # <E_A[p], E_B[q]>
    oracle_norms: tuple[Tensor, Tensor]  # <G_A[p], G_A[q]>, and of B
    own_norms: tuple[Tensor, Tensor]  # <E_A[p], E_A[q]>, and of B
    sides: tuple[Tensor, Tensor]  # <E_A[p], G_B[q]> and <E_B[p], G_A[q]>
    noise: Tensor  # [Q] float64, trace of the covariance of one group's gradient

    @classmethod
    def of(cls, oracles: Sequence[Tensor], means: Sequence[Tensor], noise: Tensor) -> "Gradients":
        """From both halves' oracles and mean gradients of the groups, all [Q, D] float64, and the noise [Q]."""
        first, second = oracles
        mean_a, mean_b = means
        sides = (mean_a @ second.T, mean_b @ first.T)
        return cls(
            target=first @ second.T,
            cross=(sides[0] + sides[1]) / 2,
            own=mean_a @ mean_b.T,
            oracle_norms=(first @ first.T, second @ second.T),
            own_norms=(mean_a @ mean_a.T, mean_b @ mean_b.T),
            sides=sides,
            noise=noise,
        )


def averaged(parts: Sequence[Gradients]) -> Gradients:
    """The mean of what several splits of the pool gave: fewer pairs of rollouts that never met."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(mean(each) for each in zip(*values, strict=True))
        return torch.stack(list(values)).mean(dim=0)

    names = [each.name for each in fields(Gradients)]
    return Gradients(**{name: mean([getattr(part, name) for part in parts]) for name in names})


def estimates(gradients: Gradients, *, seed: int) -> dict[str, Estimate]:
    """All figures, with percentile intervals over resampled prompts.

    With `<.,.>` the cross-fitted products of means over prompts, `|G|^2 = <G_A, G_B>`, `|E|^2 = <E_A, E_B>` and
    `<E, G>` the mean of `<E_A, G_B>` and `<E_B, G_A>`:

    - `cosine`: `<E, G>/(|E| |G|)`, of the expected directions, the pool's noise taken out (may exceed 1 by chance);
    - `cosine_raw`: the mean cosine of `E_A` with `G_B` and `E_B` with `G_A` as they are;
    - `bias2`: `<E_A - G_A, E_B - G_B>/|G|^2`, and `bias2_scaled`: the same after the best scaling, `1 - cosine^2`;
    - `rmse_P`: root mean square error of a step over P prompts after that scaling, `c = <E, G>/|E|^2`, in units of
      `|G|`: `sqrt(bias2_scaled + c^2 noise/(P |G|^2))` with the noise within prompts; `rmse_raw_P`: without scaling;
    - `step_cosine_P`: expected cosine of such a step with the gradient,
      `<E, G>/(|G| sqrt(|E|^2 + (noise + spread)/P))`, with `spread` the variance between prompts of the expected
      gradient: which prompts the step happens to draw;
    - `snr`: signal `<E, G>/|G|` over the noise (standard deviation) of one group of one prompt.
    """
    return _with_intervals(_figures, gradients, num_prompts=len(gradients.target), seed=seed)


def oracle_estimates(gradients: Gradients, *, seed: int) -> dict[str, Estimate]:
    """Of the two oracles: `ceiling`, their cosine, which is what `cosine_raw` would be for a faithful estimator as
    noisy as they are; and `norm`, `sqrt(<G_A, G_B>)` in reward units.

    A negative `<G_A, G_B>` makes `norm` NaN: the pool is too small to see the gradient at all.
    """
    return _with_intervals(_oracle_figures, gradients, num_prompts=len(gradients.target), seed=seed)


def _oracle_figures(gradients: Gradients, weights: Tensor) -> dict[str, Tensor]:
    target = _quadratic(gradients.target, weights)
    norms = [_quadratic(each, weights) for each in gradients.oracle_norms]
    return {"ceiling": target / (norms[0] * norms[1]).sqrt(), "norm": _root(target)}


def _figures(gradients: Gradients, weights: Tensor) -> dict[str, Tensor]:
    """Each [T], for rows of `weights` [T, Q] that sum to 1."""
    target, cross, own = (_quadratic(each, weights) for each in (gradients.target, gradients.cross, gradients.own))
    noise = weights @ gradients.noise
    spread = weights @ gradients.own.diagonal() - own
    size, length = _root(target), _root(own)
    cosine = cross / (size * length)
    bias2 = (own - 2 * cross + target) / _positive(target)
    bias2_scaled = 1 - cosine**2
    scaled_noise = (cross / own) ** 2 * noise / target
    found = {
        "cosine": cosine,
        "cosine_raw": _raw_cosine(gradients, weights),
        "bias2": bias2,
        "bias2_scaled": bias2_scaled,
        "snr": cross / (size * noise.sqrt()),
    }
    for prompts in STEP_PROMPTS:
        found[f"rmse_{prompts}"] = (bias2_scaled.clamp(min=0) + scaled_noise / prompts).sqrt()
        found[f"rmse_raw_{prompts}"] = (bias2.clamp(min=0) + noise / target / prompts).sqrt()
        found[f"step_cosine_{prompts}"] = cross / (size * _root(own + (noise + spread) / prompts))
    return found


def _raw_cosine(gradients: Gradients, weights: Tensor) -> Tensor:
    cosines = []
    for side, own, oracle in zip(gradients.sides, gradients.own_norms, reversed(gradients.oracle_norms), strict=True):
        norms = _quadratic(own, weights) * _quadratic(oracle, weights)
        cosines.append(_quadratic(side, weights) / norms.sqrt())
    return (cosines[0] + cosines[1]) / 2


def _quadratic(products: Tensor, weights: Tensor) -> Tensor:
    """[T]: the inner product of two weighted means over prompts, from the products of their prompts.

    A prompt with itself counts `w_p/Q` instead of `w_p^2`, the same at equal weights. Resampling draws prompts twice
    as if the second were new, and with `w_p^2` their own noise would count twice: intervals beside their figures.
    """
    own = products.diagonal()
    everything = torch.einsum("tp,pq,tq->t", weights, products, weights)
    return everything - weights**2 @ own + weights @ own / len(own)


def _positive(values: Tensor) -> Tensor:
    """Values at or below 0, which a squared length cannot be but its estimate can, as NaN."""
    return values.masked_fill(values <= 0, float("nan"))


def _root(values: Tensor) -> Tensor:
    return _positive(values).sqrt()


def _with_intervals(figures: Figures, gradients: Gradients, *, num_prompts: int, seed: int) -> dict[str, Estimate]:
    """Figures at equal weights, and their 2.5% and 97.5% quantiles over resampled prompts.

    A figure that more than 2.5% of the draws cannot give (a squared length came out negative) has no interval.
    """
    equal = torch.full((1, num_prompts), 1 / num_prompts, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_prompts, (DRAWS, num_prompts), generator=generator)
    weights = torch.zeros(DRAWS, num_prompts, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_prompts, dtype=torch.float64))
    values, draws = figures(gradients, equal), figures(gradients, weights)
    return {name: Estimate(float(values[name]), *_interval(draws[name])) for name in values}


def _interval(draws: Tensor) -> tuple[float, float]:
    usable = draws[~draws.isnan()]
    if len(usable) < 0.975 * len(draws):
        return float("nan"), float("nan")
    low, high = usable.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high
