"""Gradient fidelity on a policy: gradients from m rollouts against the best-of-N gradient of a large pool.

The exact gradient of a language model is unknown, so everything is cross-fitted: each prompt's pool is cut into halves
A and B with an oracle and groups of m each, and groups are compared only with the oracle of the other half. Products of
two independent unbiased estimates are unbiased, which a norm or a cosine of one noisy estimate is not.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from tealightning.diagnostics.fidelity import BATCHES, Figures, Row
from tealightning.diagnostics.measurements import EstimatorSpec, try_out
from tealightning.diagnostics.pool import Groups, half_size, split_halves
from tealightning.estimators import AdvantageEstimator

SPLITS = 4  # of the pool into halves, and of these into groups: less noise from which rollouts met
STEPS = 200  # simulated, from each half
DRAWS = 2000  # of the prompts, in the bootstrap

Products = dict[str, Tensor]  # what the figures are made of; see `cross_products`


def cross_products(oracles: Sequence[Tensor], means: Sequence[Tensor], noise: Tensor) -> Products:
    """Inner products [Q, Q] of per-prompt gradients [Q, D] of both halves A and B, `G` the oracle's and `E` the mean
    over an estimator's groups, and `noise` [Q], the trace of the covariance of one group's gradient; all float64."""
    gradients = dict(zip(("G_A", "G_B", "E_A", "E_B"), (*oracles, *means), strict=True))
    pairs = ("G_A G_B", "E_A E_B", "G_A G_A", "G_B G_B", "E_A E_A", "E_B E_B", "E_A G_B", "E_B G_A")
    products = {pair: gradients[pair[:3]] @ gradients[pair[4:]].T for pair in pairs}
    return products | {"E G": (products["E_A G_B"] + products["E_B G_A"]) / 2, "noise": noise}


def oracle_figures(products: Products, weights: Tensor) -> dict[str, Tensor]:
    """Figures [T] of the two oracles, for rows of `weights` [T, Q] over prompts that sum to 1: `ceiling`, their cosine,
    which `cosine_raw` would be for a faithful estimator as noisy as they are, and `norm`, `sqrt(<G_A, G_B>)`."""
    target, norm_a, norm_b = (_quadratic(products[name], weights) for name in ("G_A G_B", "G_A G_A", "G_B G_B"))
    return {"ceiling": target / (norm_a * norm_b).sqrt(), "norm": _positive(target).sqrt()}


def estimator_figures(products: Products, weights: Tensor) -> dict[str, Tensor]:
    """Figures [T] of an estimator (docs/how-to/diagnose-gradients.md defines them), for rows of `weights` [T, Q] over
    prompts that sum to 1."""
    value = {name: _quadratic(each, weights) for name, each in products.items() if name != "noise"}
    target, cross, own = value["G_A G_B"], value["E G"], value["E_A E_B"]
    noise = weights @ products["noise"]
    spread = weights @ products["E_A E_B"].diagonal() - own
    size, length = _positive(target).sqrt(), _positive(own).sqrt()
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
        figures[f"step_cosine_{prompts}"] = cross / (size * _positive(own + (noise + spread) / prompts).sqrt())
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


def with_intervals(
    figures_of: Callable[[Products, Tensor], dict[str, Tensor]], splits: Sequence[Products], *, seed: int
) -> Figures:
    """Figures of the mean over splits of the pool, with 95% percentile intervals over resampled prompts, unless more
    than 2.5% of the draws give no figure (a squared length came out negative)."""
    products = {name: torch.stack([each[name] for each in splits]).mean(dim=0) for name in splits[0]}
    num_prompts = len(products["noise"])
    equal = torch.full((1, num_prompts), 1 / num_prompts, dtype=torch.float64)
    weights = _shares(DRAWS, num_prompts, num_prompts, Generator().manual_seed(seed))
    values, draws = figures_of(products, equal), figures_of(products, weights)
    figures: Figures = {}
    for name, value in values.items():
        figures[name] = float(value)
        usable = draws[name][~draws[name].isnan()]
        if len(usable) >= 0.975 * DRAWS:
            low, high = usable.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            figures |= {f"{name}_low": low, f"{name}_high": high}
    return figures


def _shares(rows: int, choices: int, draws: int, generator: Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows, choices]: how often each choice is among `draws` with replacement, as a share."""
    drawn = torch.randint(choices, (rows, draws), generator=generator)
    shares = torch.zeros(rows, choices, dtype=dtype)
    return shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / draws, dtype=dtype))


def simulated_steps(
    groups: Sequence[Groups], weights: Sequence[Tensor], oracles: Sequence[Tensor], generator: Generator
) -> Figures:
    """`simulated_cosine_P` with the other half's oracle and `sign_agreement_P`, the share of coordinates with its sign,
    of steps over P prompts and groups drawn with replacement; means over both halves. The oracle's noise lowers both,
    and so does the pool's own once P is not small beside the groups that there are."""
    gradients = [each.gradients(own).flatten(0, 1) for each, own in zip(groups, weights, strict=True)]
    opposite = [oracle.mean(dim=0)[:: groups[0].half.stride] for oracle in reversed(oracles)]
    figures: Figures = {}
    for num_prompts in BATCHES:
        cosines, agreements = [], []
        for flat, oracle in zip(gradients, opposite, strict=True):
            steps = _shares(STEPS, len(flat), num_prompts, generator, flat.dtype) @ flat
            cosines.append(torch.cosine_similarity(steps.double(), oracle[None], dim=1).mean())
            agreements.append((steps.sign() == oracle.sign()).double().mean())
        figures[f"simulated_cosine_{num_prompts}"] = float(torch.stack(cosines).mean())
        figures[f"sign_agreement_{num_prompts}"] = float(torch.stack(agreements).mean())
    return figures


def measure_on_policy(
    rewards: Tensor,
    scores: Tensor,
    specs: Sequence[EstimatorSpec],
    *,
    target_n: int,
    group_sizes: Sequence[int],
    alpha: float = 0.25,
    seed: int = 0,
) -> tuple[Figures, list[Row]]:
    """Measure estimators against the oracles of a pool of rewards [Q, M] (NaN = unscorable) with scores [Q, M, D].

    Returns the figures of the oracles and a row for every group size and estimator. Every estimator meets the same
    splits, simulated steps (in the first split) and bootstrap draws of the prompts, of which there must be two.
    """
    size = half_size(rewards, smallest=max(target_n, *group_sizes))
    lowest = float(rewards[rewards.isfinite()].min())
    rows: list[Row] = []
    estimators: list[tuple[AdvantageEstimator, Row, list[Products]]] = []
    for m in dict.fromkeys(group_sizes):
        for spec in specs:
            try:
                estimator = spec.build(m=m, target_n=target_n, alpha=alpha)
                units, note = try_out(estimator, m, lowest)
            except ValueError as error:
                units, note = "", str(error)
            rows.append({"estimator": spec.label, "m": m, "units": units, "note": note})
            if units:
                estimators.append((estimator, rows[-1], []))
    steps, oracle_parts = [], []
    with tqdm(total=SPLITS * len(estimators), desc="Estimators", dynamic_ncols=True) as bar:
        for split in range(SPLITS):
            halves = split_halves(rewards, scores, size, _generator(seed, split))
            oracles = [half.oracle(target_n) for half in halves]
            oracle_parts.append(cross_products(oracles, oracles, torch.zeros(len(rewards), dtype=torch.float64)))
            if split == 0:
                signs = [oracle.mean(dim=0).sign() for oracle in oracles]
            for m, members in groupby(estimators, key=lambda each: each[1]["m"]):
                groups = [Groups(half, m) for half in halves]
                for estimator, _, parts in members:
                    weights = [each.weights(estimator) for each in groups]
                    pairs = [each.mean_and_noise(own) for each, own in zip(groups, weights, strict=True)]
                    means, (noise_a, noise_b) = zip(*pairs, strict=True)
                    parts.append(cross_products(oracles, means, (noise_a + noise_b) / 2))
                    if split == 0:  # the same draws for every estimator
                        steps.append(simulated_steps(groups, weights, oracles, _generator(seed, SPLITS)))
                    bar.update()
    for (_, row, parts), simulated in zip(estimators, steps, strict=True):
        row |= with_intervals(estimator_figures, parts, seed=seed) | simulated
    agreement = float((signs[0] == signs[1]).double().mean())
    return with_intervals(oracle_figures, oracle_parts, seed=seed) | {"sign_agreement": agreement}, rows


def _generator(seed: int, stream: int) -> Generator:
    return Generator().manual_seed((seed << 8) + stream)
