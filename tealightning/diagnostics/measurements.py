"""Measure estimators in analytic worlds: by name, world, m, N and alpha, and by training in the two-arm world."""

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import torch
import yaml
from torch import Generator, Tensor
from tqdm import tqdm

from tealightning.diagnostics.fidelity import (
    Advantages,
    Row,
    controlled_mean,
    fidelity,
    group_controls,
    group_gradients,
    norm_of_mean,
    sample_chunks,
)
from tealightning.diagnostics.worlds import Latent, World, build_world, draw_rewards
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS, AdvantageEstimator, estimator_names
from tealightning.functional.moments import ratio_or_zero
from tealightning.registry import snake_case

# ---------------------------------------------------------------- estimators by name

VARIANTS = ("tea:scale=none", "direct:tail=gpd", "direct:tail=empirical")
"""Measured beside the registered estimators, where these have the parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorSpec:
    """An estimator and some of its arguments; the others follow from m, N and alpha."""

    name: str  # registered
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """`tea[scale=none]`: the row of tables and the legend of plots."""
        arguments = ",".join(f"{key}={value}" for key, value in self.arguments)
        return f"{self.name}[{arguments}]" if arguments else self.name

    @property
    def open_parameters(self) -> set[str]:
        """Parameters of its constructor without an argument."""
        return set(inspect.signature(ESTIMATORS.get(self.name)).parameters) - {key for key, _ in self.arguments}

    def all_arguments(self, *, m: int, target_n: int, alpha: float) -> dict[str, Any]:
        """Its arguments, with N, alpha and `k`, which is min(N, m), where it takes them."""
        known = {"target_n": target_n, "alpha": alpha, "k": min(target_n, m)}
        return {key: value for key, value in known.items() if key in self.open_parameters} | dict(self.arguments)

    def build(self, *, m: int, target_n: int, alpha: float) -> AdvantageEstimator:
        """Build the estimator.

        Raises:
            UserError: for a parameter that it does not have, or a value out of range.
        """
        return ESTIMATORS.build(self.name, **self.all_arguments(m=m, target_n=target_n, alpha=alpha))


def parse_estimator(text: str) -> EstimatorSpec:
    """Parse `name` or `name:parameter=value,...`; values as in YAML.

    Raises:
        UserError: for an unknown name (with the nearest valid ones) or an argument that is no `parameter=value`.
    """
    name, _, rest = text.partition(":")
    arguments = []
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UserError(f"--estimators: expected NAME or NAME:PARAMETER=VALUE,..., got {text!r}.")
        arguments.append((key.strip(), yaml.safe_load(value)))
    return EstimatorSpec(name=snake_case(ESTIMATORS.get(name).__name__), arguments=tuple(arguments))


def parse_estimators(texts: Sequence[str] | None) -> list[EstimatorSpec]:
    """Parse names, each once; None stands for every registered estimator, each followed by its `VARIANTS`."""
    if texts is not None:
        return list(dict.fromkeys(map(parse_estimator, texts)))
    variants = [parse_estimator(text) for text in VARIANTS if text.partition(":")[0] in estimator_names()]
    specs = []
    for plain in (EstimatorSpec(name=name) for name in estimator_names()):
        own = [v for v in variants if v.name == plain.name and {key for key, _ in v.arguments} <= plain.open_parameters]
        specs += [plain, *own]
    return specs


@dataclass(kw_only=True, slots=True)
class Trial:
    """Outcome of calling an estimator on groups of a size."""

    refusal: str = ""  # why it does not take them
    warning: str = ""
    reward_units: bool = False  # A(4 R) = 4 A(R): its gradient has a scale that can be right or wrong

    @property
    def note(self) -> str:
        """The refusal or the warning."""
        return self.refusal or self.warning

    @property
    def units(self) -> str:
        """The scale of its gradient: "reward" or "own"; empty if it refused."""
        return "" if self.refusal else "reward" if self.reward_units else "own"


def try_out(estimator: AdvantageEstimator, m: int, lowest: float = -math.inf) -> Trial:
    """Call an estimator on a few groups of m rewards.

    Args:
        estimator: If it has a lowest reward, it meets only rewards above that, provided that `lowest` is not below it.
        m: Rollouts a group.
        lowest: Lowest of the rewards that the estimator is meant for.
    """
    rewards = torch.randn(16, m, generator=Generator().manual_seed(0), dtype=torch.float64)
    if lowest >= estimator.lowest_reward > -math.inf:
        rewards = estimator.lowest_reward + rewards.abs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            advantages, scaled = estimator(rewards), estimator(4 * rewards)
        except ValueError as error:
            return Trial(refusal=str(error))
    return Trial(
        warning=" ".join(dict.fromkeys(str(w.message) for w in caught)),
        reward_units=bool(advantages.any()) and torch.allclose(scaled, 4 * advantages, rtol=1e-9, atol=1e-12),
    )


# ---------------------------------------------------------------- measurements in the worlds

M_SWEEP = (16, 32, 64, 128, 256, 512)
ALPHA_SWEEP = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
TAIL_SWEEP = ("gpd_-0.4", "gpd_-0.3", "gpd_-0.2", "gpd_-0.1", "gpd_0", "gpd_0.1", "gpd_0.2", "gpd_0.3")
ALPHA_WORLDS = ("gaussian", "mixture", "gpd_0")
SWEEPS = ("m", "alpha", "tail")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A setting in which every estimator is measured."""

    sweep: str  # "main", or what varies: "m", "alpha", "tail"
    world: str
    m: int
    target_n: int
    alpha: float


def main_measurements(
    worlds: Sequence[str], ms: Sequence[int], target_ns: Sequence[int], alphas: Sequence[float]
) -> list[Measurement]:
    """All combinations."""
    return [
        Measurement(sweep="main", world=world, m=m, target_n=n, alpha=alpha)
        for world, m, n, alpha in product(worlds, ms, target_ns, alphas)
    ]


def sweep_measurements(sweep: str, *, m: int, target_n: int, alpha: float) -> list[Measurement]:
    """The settings of a sweep over the group size, the tail level, or the tail index of the rewards."""
    settings: dict[str, tuple[Sequence[str], Sequence[int], Sequence[float]]] = {
        "m": (("gaussian",), M_SWEEP, (alpha,)),
        "alpha": (ALPHA_WORLDS, (m,), ALPHA_SWEEP),
        "tail": (TAIL_SWEEP, (m,), (alpha,)),
    }
    worlds, ms, alphas = settings[sweep]
    return [
        Measurement(sweep=sweep, world=world, m=size, target_n=target_n, alpha=level)
        for world, size, level in product(worlds, ms, alphas)
    ]


def takes_part(spec: EstimatorSpec, sweep: str) -> bool:
    """Whether an estimator is part of a sweep: those over alpha and the tail index are about estimators of a tail."""
    has_alpha = "alpha" in spec.open_parameters or (sweep == "tail" and "alpha" in dict(spec.arguments))
    return sweep in ("main", "m") or has_alpha


def measure(
    measurements: Iterable[Measurement],
    specs: Sequence[EstimatorSpec],
    *,
    groups: int,
    seed: int,
    progress: bool = False,
) -> list[Row]:
    """A row for every measurement and estimator, in that order; measurements of one world and m share their groups.

    Raises:
        UserError: for a world or an estimator's argument that does not exist or is out of range.
    """
    batches = [list(batch) for _, batch in groupby(measurements, key=lambda each: (each.sweep, each.world, each.m))]
    first = batches[0][0]
    for spec in specs:  # wrong arguments are reported before the work begins
        spec.build(m=first.m, target_n=first.target_n, alpha=first.alpha)
    worlds = {batch[0].world: build_world(batch[0].world) for batch in batches}
    rows: list[Row] = []
    for batch in tqdm(batches, unit="world", desc="fidelity", disable=not progress, leave=False):
        rows += _measure_batch(worlds[batch[0].world], batch, specs, groups=groups, seed=seed)
    return rows


def _measure_batch(
    world: World, batch: Sequence[Measurement], specs: Sequence[EstimatorSpec], *, groups: int, seed: int
) -> list[Row]:
    """The rows of measurements of one world and m."""
    sweep, m = batch[0].sweep, batch[0].m
    jobs = [(each, spec, _key(each, spec)) for each in batch for spec in specs if takes_part(spec, sweep)]
    # Without N and alpha an estimator is the same in every measurement.
    built = {key: spec.build(m=m, target_n=each.target_n, alpha=each.alpha) for each, spec, key in jobs}
    lowest = float(world.sample(64, m, Generator().manual_seed(seed))[0].min())
    trials = {key: try_out(estimator, m, lowest) for key, estimator in built.items()}
    accepted = {key: estimator for key, estimator in built.items() if not trials[key].refusal}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `trials` holds them
        gradients = group_gradients(accepted, world, m, groups=groups, seed=seed)
    if sweep == "m":
        assert isinstance(world, Latent), "control variates need the latent"
        chunks = sample_chunks(world, m, groups=groups, seed=seed)
        controls = torch.cat([group_controls(scores[..., 0], batch[0].alpha) for _, scores in chunks])
    rows = []
    for each, spec, key in jobs:
        row: Row = {"sweep": sweep, "world": each.world, "estimator": spec.label, "m": m, "target_n": each.target_n}
        row |= {"alpha": each.alpha, "units": trials[key].units, "note": trials[key].note}
        if key in gradients:
            truth = world.exact_gradient(each.target_n)
            row |= fidelity(gradients[key], truth, world.directions)
            if sweep == "m":  # a norm several times more precise than `bias`
                mean, covariance = controlled_mean(gradients[key].gradients, controls)
                row["controlled_bias"], row["controlled_bias_se"] = norm_of_mean(mean - truth, covariance)
        rows.append(row)
    return rows


def _key(each: Measurement, spec: EstimatorSpec) -> str:
    return f"{spec.name}{spec.all_arguments(m=each.m, target_n=each.target_n, alpha=each.alpha)}"


# ---------------------------------------------------------------- training in the two-arm world

PROMPTS, STEPS, LEARNING_RATE = 64, 300, 0.03
DECISION_SETTINGS = ((16, 128), (16, 512), (32, 512), (64, 512))
"""(m, N) of the table of decisions."""


def train_two_arms(
    estimator: Advantages, m: int, *, seeds: Sequence[int], prompts: int = PROMPTS, steps: int = STEPS
) -> Tensor:
    """Final probability of arm B for every seed: [S] float64, from 0.5 and by Adam at 0.03.

    A softmax policy chooses between A, which has the larger mean and the larger best of 16, and B, which has the
    larger best of 128 and beyond (see `worlds.TwoArms`). The advantages are divided by their root mean square over the
    batch, so that all estimators train at one speed. The seeds are trained side by side; a seed's result does not
    depend on the others.

    Args:
        estimator: Rewards [P, m] to advantages [P, m].
        m: Rollouts a prompt.
        seeds: One for each training.
        prompts: Prompts a step.
        steps: Adam steps.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    logits = torch.zeros(len(seeds), 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE, maximize=True)
    for _ in range(steps):
        policy = torch.softmax(logits.detach(), dim=1)
        plays = [_play(p, prompts, m, generator) for p, generator in zip(policy[:, 1], generators, strict=True)]
        arms, rewards = (torch.stack(each) for each in zip(*plays, strict=True))
        advantages = estimator(rewards.flatten(0, 1)).view_as(rewards)
        rms = advantages.square().mean(dim=(1, 2), keepdim=True).sqrt()
        advantages = ratio_or_zero(advantages, rms)
        chosen = torch.stack([1 - arms, arms], dim=-1)
        logits.grad = (advantages[..., None] * (chosen - policy[:, None, None])).mean(dim=(1, 2))
        optimizer.step()
    return torch.softmax(logits.detach(), dim=1)[:, 1]


def _play(probability: Tensor, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Arms [P, m] float64 (1 = B) and their rewards."""
    arms = (torch.rand(prompts, m, generator=generator, dtype=torch.float64) < probability).double()
    return arms, draw_rewards(arms, generator)


def measure_decisions(
    specs: Iterable[EstimatorSpec],
    *,
    settings: Sequence[tuple[int, int]] = DECISION_SETTINGS,
    alpha: float = 0.25,
    seeds: Sequence[int] = range(5),
    progress: bool = False,
) -> list[Row]:
    """A row for every (m, N) and estimator: mean, lowest and highest final probability of B over the seeds.

    An estimator that refuses an m has a row with the reason as its `note` and no probabilities.
    """
    rows = []
    jobs = [(m, target_n, spec) for m, target_n in settings for spec in specs]
    for m, target_n, spec in tqdm(jobs, unit="training", desc="decision", disable=not progress, leave=False):
        estimator = spec.build(m=m, target_n=target_n, alpha=alpha)
        row: Row = {"estimator": spec.label, "m": m, "target_n": target_n, "alpha": alpha}
        trial = try_out(estimator, m)
        if not trial.refusal:
            final = train_two_arms(estimator, m, seeds=seeds)
            row |= {"mean": float(final.mean()), "lowest": float(final.min()), "highest": float(final.max())}
        rows.append(row | {"seeds": len(seeds), "note": trial.note})
    return rows
