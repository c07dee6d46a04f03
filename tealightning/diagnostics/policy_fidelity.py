"""Gradient fidelity on a policy: gradients from m rollouts against the best-of-N gradient of a large pool.

The exact gradient of a language model is unknown, so everything is cross-fitted: each prompt's pool is cut into halves
A and B, each half has its own oracle and its own groups of m, and what groups of one half say is compared only with
the oracle of the other half. Products of two independent unbiased estimates are unbiased, which a norm or a cosine of
one noisy estimate is not. The products of several random splits are averaged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tealightning.diagnostics.fidelity import BATCHES, Figures, Row
from tealightning.diagnostics.measurements import EstimatorSpec, try_out
from tealightning.diagnostics.pool import Groups, half_size, split_halves
from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator

SPLITS = 4
"""Random splits of the pool into halves, and of the halves into groups: less noise from which rollouts met."""
STEPS = 200
"""Simulated steps from each half."""
DRAWS = 2000
"""Bootstrap draws of the prompts."""


# ---------------------------------------------------------------- cross-fitted figures

Products = dict[str, Tensor]
"""What the figures are made of; see `cross_products`."""


def cross_products(oracles: Sequence[Tensor], means: Sequence[Tensor], noise: Tensor) -> Products:
    """Inner products of per-prompt gradients, all [Q, Q] float64 with prompts p, q, and the noise of one group [Q].

    `G` is the oracle's gradient, `E` the mean over the groups of an estimator, A and B the halves.

    Args:
        oracles: Of both halves, [Q, D] float64.
        means: Mean gradients of the groups of both halves, [Q, D] float64.
        noise: [Q] float64, trace of the covariance of one group's gradient.
    """
    (oracle_a, oracle_b), (mean_a, mean_b) = oracles, means
    side_a, side_b = mean_a @ oracle_b.T, mean_b @ oracle_a.T
    return {
        "G_A G_B": oracle_a @ oracle_b.T,
        "E G": (side_a + side_b) / 2,
        "E_A E_B": mean_a @ mean_b.T,
        "G_A G_A": oracle_a @ oracle_a.T,
        "G_B G_B": oracle_b @ oracle_b.T,
        "E_A E_A": mean_a @ mean_a.T,
        "E_B E_B": mean_b @ mean_b.T,
        "E_A G_B": side_a,
        "E_B G_A": side_b,
        "noise": noise,
    }


def average(splits: Sequence[Products]) -> Products:
    """The mean over several splits of the pool: fewer pairs of rollouts that never met."""
    return {name: torch.stack([each[name] for each in splits]).mean(dim=0) for name in splits[0]}


def estimator_figures(products: Products, *, seed: int) -> Figures:
    """Figures of an estimator, with percentile intervals over resampled prompts.

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
    return _with_intervals(_estimator_figures, products, seed=seed)


def oracle_figures(products: Products, *, seed: int) -> Figures:
    """Figures of the two oracles: `ceiling`, their cosine, which is what `cosine_raw` would be for a faithful
    estimator as noisy as they are; and `norm`, `sqrt(<G_A, G_B>)` in reward units.

    A negative `<G_A, G_B>` makes `norm` NaN: the pool is too small to see the gradient at all.
    """
    return _with_intervals(_oracle_figures, products, seed=seed)


def _oracle_figures(products: Products, weights: Tensor) -> dict[str, Tensor]:
    target, norm_a, norm_b = (_quadratic(products[name], weights) for name in ("G_A G_B", "G_A G_A", "G_B G_B"))
    return {"ceiling": target / (norm_a * norm_b).sqrt(), "norm": _root(target)}


def _estimator_figures(products: Products, weights: Tensor) -> dict[str, Tensor]:
    """Each [T], for rows of `weights` [T, Q] that sum to 1."""
    value = {name: _quadratic(each, weights) for name, each in products.items() if name != "noise"}
    target, cross, own = value["G_A G_B"], value["E G"], value["E_A E_B"]
    noise = weights @ products["noise"]
    spread = weights @ products["E_A E_B"].diagonal() - own
    size, length = _root(target), _root(own)
    cosine = cross / (size * length)
    raw = [value[f"E_{e} G_{g}"] / (value[f"E_{e} E_{e}"] * value[f"G_{g} G_{g}"]).sqrt() for e, g in ("AB", "BA")]
    bias2 = (own - 2 * cross + target) / _positive(target)
    bias2_scaled = 1 - cosine**2
    scaled_noise = (cross / own) ** 2 * noise / target
    figures = {"cosine": cosine, "cosine_raw": (raw[0] + raw[1]) / 2, "bias2": bias2, "bias2_scaled": bias2_scaled}
    figures["snr"] = cross / (size * noise.sqrt())
    for prompts in BATCHES:
        figures[f"rmse_{prompts}"] = (bias2_scaled.clamp(min=0) + scaled_noise / prompts).sqrt()
        figures[f"rmse_raw_{prompts}"] = (bias2.clamp(min=0) + noise / target / prompts).sqrt()
        figures[f"step_cosine_{prompts}"] = cross / (size * _root(own + (noise + spread) / prompts))
    return figures


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


def _with_intervals(
    figures_of: Callable[[Products, Tensor], dict[str, Tensor]], products: Products, *, seed: int
) -> Figures:
    """Figures at equal weights, and their 2.5% and 97.5% quantiles over resampled prompts.

    A figure that more than 2.5% of the draws cannot give (a squared length came out negative) has no interval.
    """
    num_prompts = len(products["noise"])
    equal = torch.full((1, num_prompts), 1 / num_prompts, dtype=torch.float64)
    drawn = torch.randint(num_prompts, (DRAWS, num_prompts), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(DRAWS, num_prompts, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_prompts, dtype=torch.float64))
    values, draws = figures_of(products, equal), figures_of(products, weights)
    figures: Figures = {}
    for name, value in values.items():
        figures[name] = float(value)
        usable = draws[name][~draws[name].isnan()]
        if len(usable) >= 0.975 * DRAWS:
            low, high = usable.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            figures |= {f"{name}_low": low, f"{name}_high": high}
    return figures


def simulated_steps(
    groups: Sequence[Tensor], oracles: Sequence[Tensor], *, num_prompts: int, generator: torch.Generator
) -> Figures:
    """Mean cosine with an independent oracle, and mean share of coordinates with its sign, of steps over P prompts.

    Prompts and groups are drawn with replacement. Nothing is corrected: the oracle's noise lowers both figures, and so
    does the pool's own noise once P is not small beside the groups that there are.

    Args:
        groups: Gradients of the groups of each half, [Q, G, D].
        oracles: For each half the mean oracle [D] of the other.
        num_prompts: P.
        generator: Source of the draws.

    Returns:
        `simulated_cosine_P` and `sign_agreement_P`, means over both halves.
    """
    cosines, agreements = [], []
    for gradients, oracle in zip(groups, oracles, strict=True):
        flat = gradients.flatten(0, 1)
        drawn = torch.randint(len(flat), (STEPS, num_prompts), generator=generator)
        shares = torch.zeros(STEPS, len(flat), dtype=flat.dtype)
        shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_prompts, dtype=flat.dtype))
        steps = shares @ flat
        cosines.append(torch.cosine_similarity(steps.double(), oracle[None], dim=1).mean())
        agreements.append((steps.sign() == oracle.sign()).double().mean())
    means = {"simulated_cosine": torch.stack(cosines).mean(), "sign_agreement": torch.stack(agreements).mean()}
    return {f"{name}_{num_prompts}": float(mean) for name, mean in means.items()}


# ---------------------------------------------------------------- the study


class PolicyFidelity:
    """Estimators against the oracles of a pool.

    Args:
        rewards: [Q, M] float64; NaN = unscorable.
        scores: [Q, M, D] projected score vectors.
        target_n: N, at most half of the scored rollouts of every prompt.
        group_sizes: Those that may be asked for, at most as large as a half.
        alpha: Tail level of the estimators that take one.
        seed: Seed of the splits, the simulated steps and the bootstrap; the same ones for every estimator.

    Raises:
        UserError: for fewer than two prompts or too few rollouts.
    """

    def __init__(
        self,
        rewards: Tensor,
        scores: Tensor,
        *,
        target_n: int,
        group_sizes: Sequence[int],
        alpha: float = 0.25,
        seed: int = 0,
    ) -> None:
        if len(rewards) < 2:
            raise UserError(f"prompts must be at least 2 for an interval, got {len(rewards)}.")
        self.half_size = half_size(rewards, smallest=max(target_n, *group_sizes))
        self.rewards, self.scores = rewards, scores
        self.group_sizes = list(dict.fromkeys(group_sizes))
        self.target_n, self.alpha, self.seed = target_n, alpha, seed

    def run(
        self, specs: Sequence[EstimatorSpec], on_progress: Callable[[], Any] = lambda: None
    ) -> tuple[Figures, list[Row]]:
        """Figures of the oracles (`oracle_figures` and `sign_agreement`), and a row for every group size and estimator;
        `on_progress` is called after each, in each split."""
        rows: list[Row] = []
        trials: list[tuple[AdvantageEstimator, int]] = []
        lowest = float(self.rewards[self.rewards.isfinite()].min())
        for m in self.group_sizes:
            for spec in specs:
                row: Row = {"estimator": spec.label, "m": m, "units": ""}
                try:
                    estimator = spec.build(m=m, target_n=self.target_n, alpha=self.alpha)
                except ValueError as error:
                    rows.append(row | {"note": str(error)})
                    continue
                trial = try_out(estimator, m, lowest)
                rows.append(row | {"units": trial.units, "note": trial.note})
                if not trial.refusal:
                    trials.append((estimator, m))
        ceiling, figures = self.measure(trials, on_progress)
        measured_rows = [row for row in rows if row["units"]]
        for row, each in zip(measured_rows, figures, strict=True):
            row |= each
        return ceiling, rows

    def measure(
        self, trials: Sequence[tuple[AdvantageEstimator, int]], on_progress: Callable[[], Any] = lambda: None
    ) -> tuple[Figures, list[Figures]]:
        """Figures of the oracles, and those (`estimator_figures`, `simulated_steps`) of each estimator with its group
        size. Simulated steps are drawn from the first split."""
        oracle_parts: list[Products] = []
        parts: list[list[Products]] = [[] for _ in trials]
        steps: list[Figures] = [{} for _ in trials]
        for split in range(SPLITS):
            halves = split_halves(self.rewards, self.scores, self.half_size, self._generator(split))
            oracles = [half.oracle(self.target_n) for half in halves]
            oracle_parts.append(cross_products(oracles, oracles, torch.zeros(len(self.rewards), dtype=torch.float64)))
            if split == 0:
                signs = [oracle.mean(dim=0).sign() for oracle in oracles]
            for m in self.group_sizes:
                groups = [Groups(half, m) for half in halves]
                for index, estimator in [(i, each) for i, (each, size) in enumerate(trials) if size == m]:
                    weights = [each.weights(estimator) for each in groups]
                    pairs = [each.mean_and_noise(w) for each, w in zip(groups, weights, strict=True)]
                    (mean_a, noise_a), (mean_b, noise_b) = pairs
                    parts[index].append(cross_products(oracles, (mean_a, mean_b), (noise_a + noise_b) / 2))
                    if split == 0:
                        steps[index] = self._steps(oracles, groups, weights)
                    on_progress()
        ceiling = oracle_figures(average(oracle_parts), seed=self.seed)
        ceiling["sign_agreement"] = float((signs[0] == signs[1]).double().mean())
        figures = [estimator_figures(average(part), seed=self.seed) for part in parts]
        return ceiling, [each | step for each, step in zip(figures, steps, strict=True)]

    def _steps(self, oracles: Sequence[Tensor], groups: Sequence[Groups], weights: Sequence[Tensor]) -> Figures:
        gradients = [each.gradients(w) for each, w in zip(groups, weights, strict=True)]
        opposite = [oracle.mean(dim=0)[:: groups[0].half.stride] for oracle in reversed(oracles)]
        generator = self._generator(SPLITS)  # the same draws for every estimator
        figures: Figures = {}
        for num_prompts in BATCHES:
            figures |= simulated_steps(gradients, opposite, num_prompts=num_prompts, generator=generator)
        return figures

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 8) + stream)
