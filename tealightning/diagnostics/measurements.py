"""Measure estimators in analytic worlds: by name, world, m, N and alpha, and by training in the two-arm world."""

import inspect
import math
import warnings
from collections.abc import Sequence
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
import yaml
from torch import Generator, Tensor
from tqdm import tqdm

from tealightning.diagnostics import fidelity
from tealightning.diagnostics.fidelity import Advantages, Row
from tealightning.diagnostics.worlds import LatentWorld, World, build_world, draw_rewards
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS, AdvantageEstimator, estimator_names
from tealightning.functional.moments import ratio_or_zero
from tealightning.registry import snake_case

# Measured beside the registered estimators.
VARIANTS = ("tea:scale=none", "direct:tail=gpd", "direct:tail=empirical")


class EstimatorSpec(NamedTuple):
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
        """Build the estimator; a UserError names a wrong parameter or value."""
        return ESTIMATORS.build(self.name, **self.all_arguments(m=m, target_n=target_n, alpha=alpha))


def parse_estimator(text: str) -> EstimatorSpec:
    """Parse `name` or `name:parameter=value,...`; values as in YAML."""
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
    variants = [parse_estimator(text) for text in VARIANTS]
    specs = []
    for name in estimator_names():
        specs += [EstimatorSpec(name=name), *(each for each in variants if each.name == name)]
    return specs


def try_out(estimator: AdvantageEstimator, m: int, lowest: float = -math.inf) -> tuple[str, str]:
    """Call an estimator on a few groups of m rewards for the `units` and the `note` of its row; what refuses rewards
    below some bound meets only rewards above it, unless those that it is meant for go lower."""
    rewards = torch.randn(16, m, generator=Generator().manual_seed(0), dtype=torch.float64)
    if lowest >= estimator.lowest_reward > -math.inf:
        rewards = estimator.lowest_reward + rewards.abs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            advantages, scaled = estimator(rewards), estimator(4 * rewards)
        except ValueError as error:
            return "", str(error)
    has_scale = bool(advantages.any()) and torch.allclose(scaled, 4 * advantages, rtol=1e-9, atol=1e-12)
    return "reward" if has_scale else "own", " ".join(dict.fromkeys(str(w.message) for w in caught))


SWEEPS: dict[str, dict[str, Sequence[Any]]] = {
    "m": {"world": ("gaussian",), "m": (16, 32, 64, 128, 256, 512)},
    "alpha": {"world": ("gaussian", "mixture", "gpd_0"), "alpha": (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)},
    "tail": {"world": [f"gpd_{shape:g}" for shape in (-0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3)]},
}
"""What varies in a sweep over the group size, the tail level, or the tail index of the rewards."""


class Measurement(NamedTuple):
    """A setting in which every estimator is measured."""

    sweep: str  # "main", or one of `SWEEPS`
    world: str
    m: int
    target_n: int
    alpha: float


def measurements_of(
    sweep: str, worlds: Sequence[str], ms: Sequence[int], target_ns: Sequence[int], alphas: Sequence[float]
) -> list[Measurement]:
    """All combinations in "main"; in a sweep those of what it varies, at the first of the others."""
    grid: dict[str, Sequence[Any]] = {"world": worlds, "m": ms, "target_n": target_ns, "alpha": alphas}
    if sweep != "main":
        grid = {key: values[:1] for key, values in grid.items()} | SWEEPS[sweep]
    return [Measurement(sweep=sweep, **dict(zip(grid, each, strict=True))) for each in product(*grid.values())]


def takes_part(spec: EstimatorSpec, sweep: str) -> bool:
    """Whether an estimator is part of a sweep: those over alpha and the tail index are about estimators of a tail."""
    has_alpha = "alpha" in spec.open_parameters or (sweep == "tail" and "alpha" in dict(spec.arguments))
    return sweep in ("main", "m") or has_alpha


def measure(measurements: list[Measurement], specs: Sequence[EstimatorSpec], *, groups: int, seed: int) -> list[Row]:
    """A row for every measurement and estimator, in that order; measurements of one world and m share their groups."""
    batches = [list(batch) for _, batch in groupby(measurements, key=lambda each: (each.sweep, each.world, each.m))]
    first = batches[0][0]
    for spec in specs:  # wrong arguments are reported before the work begins
        spec.build(m=first.m, target_n=first.target_n, alpha=first.alpha)
    worlds = {batch[0].world: build_world(batch[0].world) for batch in batches}
    rows: list[Row] = []
    for batch in tqdm(batches, unit="world", desc="fidelity", leave=False):
        rows += _measure_batch(worlds[batch[0].world], batch, specs, groups=groups, seed=seed)
    return rows


def _measure_batch(
    world: World, batch: Sequence[Measurement], specs: Sequence[EstimatorSpec], *, groups: int, seed: int
) -> list[Row]:
    """The rows of measurements of one world and m."""
    sweep, m = batch[0].sweep, batch[0].m
    # Without N and alpha an estimator is the same in every measurement.
    jobs, built = [], {}
    for each, spec in product(batch, [spec for spec in specs if takes_part(spec, sweep)]):
        setting: dict[str, Any] = {"m": m, "target_n": each.target_n, "alpha": each.alpha}
        jobs.append((each, spec, f"{spec.name}{spec.all_arguments(**setting)}"))
        built[jobs[-1][2]] = spec.build(**setting)
    lowest = float(world.sample(64, m, Generator().manual_seed(seed))[0].min())
    trials = {key: try_out(estimator, m, lowest) for key, estimator in built.items()}
    accepted = {key: estimator for key, estimator in built.items() if trials[key][0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `trials` holds them
        gradients = fidelity.group_gradients(accepted, world, m, groups=groups, seed=seed)
    if sweep == "m":
        assert isinstance(world, LatentWorld), "control variates need the latent"
        chunks = fidelity.sample_chunks(world, m, groups=groups, seed=seed)
        controls = torch.cat([fidelity.group_controls(scores[..., 0], batch[0].alpha) for _, scores in chunks])
    rows = []
    for each, spec, key in jobs:
        units, note = trials[key]
        row: Row = {"sweep": sweep, "world": each.world, "estimator": spec.label, "m": m, "target_n": each.target_n}
        row |= {"alpha": each.alpha, "units": units, "note": note}
        if units:
            truth = world.exact_gradient(each.target_n)
            row |= fidelity.fidelity(gradients[key], truth, world.directions)
            if sweep == "m":  # a norm several times more precise than `bias`
                mean, covariance = fidelity.controlled_mean(gradients[key].gradients, controls)
                row["controlled_bias"], row["controlled_bias_se"] = fidelity.norm_of_mean(mean - truth, covariance)
        rows.append(row)
    return rows


DECISION_SETTINGS = ((16, 128), (16, 512), (32, 512), (64, 512))  # (m, N)


def train_two_arms(
    estimator: Advantages, m: int, *, seeds: Sequence[int], prompts: int = 64, steps: int = 300
) -> Tensor:
    """Final probability of arm B for every seed: [S] float64, from 0.5 and by Adam at 0.03.

    A softmax policy chooses between the arms of `worlds.TwoArms`. The advantages are divided by their root mean square
    over the batch, so that all estimators train at one speed. A seed's result does not depend on the others.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    logits = torch.zeros(len(seeds), 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.03, maximize=True)
    for _ in range(steps):
        policy = torch.softmax(logits.detach(), dim=1)
        plays = []
        for probability, generator in zip(policy[:, 1], generators, strict=True):
            arms = (torch.rand(prompts, m, generator=generator, dtype=torch.float64) < probability).double()
            plays.append((arms, draw_rewards(arms, generator)))
        arms, rewards = (torch.stack(each) for each in zip(*plays, strict=True))
        advantages = estimator(rewards.flatten(0, 1)).view_as(rewards)
        rms = advantages.square().mean(dim=(1, 2), keepdim=True).sqrt()
        advantages = ratio_or_zero(advantages, rms)
        chosen = torch.stack([1 - arms, arms], dim=-1)
        logits.grad = (advantages[..., None] * (chosen - policy[:, None, None])).mean(dim=(1, 2))
        optimizer.step()
    return torch.softmax(logits.detach(), dim=1)[:, 1]


def measure_decisions(
    specs: Sequence[EstimatorSpec], *, settings: Sequence[tuple[int, int]], alpha: float, seeds: Sequence[int]
) -> list[Row]:
    """A row for every (m, N) and estimator: mean, lowest and highest final probability of B over the seeds, or a note
    on why it refuses m."""
    rows = []
    jobs = [(m, target_n, spec) for m, target_n in settings for spec in specs]
    for m, target_n, spec in tqdm(jobs, unit="training", desc="decision", leave=False):
        estimator = spec.build(m=m, target_n=target_n, alpha=alpha)
        units, note = try_out(estimator, m)
        row: Row = {"estimator": spec.label, "m": m, "target_n": target_n, "alpha": alpha}
        if units:
            final = train_two_arms(estimator, m, seeds=seeds)
            row |= {"mean": float(final.mean()), "lowest": float(final.min()), "highest": float(final.max())}
        rows.append(row | {"seeds": len(seeds), "note": note})
    return rows
