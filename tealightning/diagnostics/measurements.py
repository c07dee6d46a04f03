"""What `diagnose gradients` measures: estimators named on the command line, by world, m, N and alpha."""

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from tealightning.diagnostics.fidelity import fidelity, group_gradients, norm_of_mean, sample_chunks
from tealightning.diagnostics.slopes import controlled_mean, group_controls
from tealightning.diagnostics.worlds import Latent, World, build_world
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS, AdvantageEstimator, estimator_names
from tealightning.registry import snake_case

VARIANTS = ("tea:scale=none", "direct:tail=gpd", "direct:tail=empirical")
"""Measured beside the registered estimators, where these have the parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorSpec:
    """An estimator and the arguments that were given for it; the others follow from m, N and alpha."""

    name: str  # registered
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """`tea[scale=none]`: the row of tables and the legend of plots."""
        given = ",".join(f"{key}={value}" for key, value in self.arguments)
        return f"{self.name}[{given}]" if given else self.name

    @property
    def parameters(self) -> set[str]:
        """What its constructor takes and was not given."""
        return set(inspect.signature(ESTIMATORS.get(self.name)).parameters) - {key for key, _ in self.arguments}

    def all_arguments(self, *, m: int, target_n: int, alpha: float) -> dict[str, Any]:
        """Those given, and those that it takes of N, alpha and `k`, which is min(N, m)."""
        known = {"target_n": target_n, "alpha": alpha, "k": min(target_n, m)}
        return {key: value for key, value in known.items() if key in self.parameters} | dict(self.arguments)

    def build(self, *, m: int, target_n: int, alpha: float) -> AdvantageEstimator:
        """The estimator with these.

        Raises:
            ValueError: for a parameter that it does not have, or a value out of range.
        """
        return ESTIMATORS.build(self.name, **self.all_arguments(m=m, target_n=target_n, alpha=alpha))


def parse_estimator(text: str) -> EstimatorSpec:
    """`name` or `name:parameter=value,...`; values as in YAML.

    Raises:
        ValueError: for an unknown name (with the nearest valid ones) or an argument that is no `parameter=value`.
    """
    name, _, given = text.partition(":")
    arguments = []
    for part in filter(None, given.split(",")):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UserError(f"--estimators: expected NAME or NAME:PARAMETER=VALUE,..., got {text!r}.")
        arguments.append((key.strip(), yaml.safe_load(value)))
    return EstimatorSpec(name=snake_case(ESTIMATORS.get(name).__name__), arguments=tuple(arguments))


def default_estimators() -> list[EstimatorSpec]:
    """Every registered estimator, each followed by its `VARIANTS`."""
    variants = [parse_estimator(text) for text in VARIANTS if text.partition(":")[0] in estimator_names()]
    result = []
    for name in estimator_names():
        result.append(EstimatorSpec(name=name))
        has = EstimatorSpec(name=name).parameters
        result += [v for v in variants if v.name == name and {key for key, _ in v.arguments} <= has]
    return result


def parse_estimators(texts: Sequence[str] | None) -> list[EstimatorSpec]:
    """What was asked for, each once; everything registered if nothing was."""
    return default_estimators() if texts is None else list(dict.fromkeys(map(parse_estimator, texts)))


@dataclass(kw_only=True, slots=True)
class Trial:
    """What an estimator makes of groups of a size."""

    refused: str = ""  # why it does not take them
    warned: str = ""  # what it says about them
    reward_units: bool = False  # A(4 R) = 4 A(R): its gradient has a scale that can be right or wrong


def try_out(estimator: AdvantageEstimator, m: int, lowest: float = -math.inf) -> Trial:
    """Call it on a few groups of m rewards; an estimator with a lowest reward meets only rewards above it if those that
    it is meant for, of which the lowest is `lowest`, are."""
    rewards = torch.randn(16, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if lowest >= estimator.lowest_reward > -math.inf:
        rewards = estimator.lowest_reward + rewards.abs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            advantages, scaled = estimator(rewards), estimator(4 * rewards)
        except ValueError as error:
            return Trial(refused=str(error))
    return Trial(
        warned=" ".join(dict.fromkeys(str(w.message) for w in caught)),
        reward_units=bool(advantages.any()) and torch.allclose(scaled, 4 * advantages, rtol=1e-9, atol=1e-12),
    )


M_SWEEP = (16, 32, 64, 128, 256, 512)
ALPHA_SWEEP = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
TAIL_SWEEP = ("gpd_-0.4", "gpd_-0.3", "gpd_-0.2", "gpd_-0.1", "gpd_0", "gpd_0.1", "gpd_0.2", "gpd_0.3")
ALPHA_WORLDS = ("gaussian", "mixture", "gpd_0")
SWEEPS = ("m", "alpha", "tail")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One combination, in which every estimator is measured."""

    sweep: str  # "main", or what varies: "m", "alpha", "tail"
    world: str
    m: int
    target_n: int
    alpha: float


def main_cells(
    worlds: Sequence[str], ms: Sequence[int], target_ns: Sequence[int], alphas: Sequence[float]
) -> list[Cell]:
    """All combinations."""
    return [
        Cell(sweep="main", world=world, m=m, target_n=n, alpha=alpha)
        for world in worlds
        for m in ms
        for n in target_ns
        for alpha in alphas
    ]


def sweep_cells(sweep: str, *, m: int, target_n: int, alpha: float) -> list[Cell]:
    """What varies in a sweep: the group size, the tail level, or the tail index of the rewards."""
    if sweep == "m":
        return [Cell(sweep=sweep, world="gaussian", m=size, target_n=target_n, alpha=alpha) for size in M_SWEEP]
    if sweep == "alpha":
        return [
            Cell(sweep=sweep, world=world, m=m, target_n=target_n, alpha=level)
            for world in ALPHA_WORLDS
            for level in ALPHA_SWEEP
        ]
    return [Cell(sweep=sweep, world=world, m=m, target_n=target_n, alpha=alpha) for world in TAIL_SWEEP]


def takes_part(spec: EstimatorSpec, sweep: str) -> bool:
    """The sweeps over alpha and the tail index are about estimators that look at a tail."""
    return sweep in ("main", "m") or "alpha" in spec.parameters or (sweep == "tail" and "alpha" in dict(spec.arguments))


def measure(
    cells: Iterable[Cell], specs: Sequence[EstimatorSpec], *, groups: int, seed: int, progress: bool = False
) -> list[Row]:
    """A row for every cell and estimator, in that order. Cells of one world and m share their groups.

    Raises:
        ValueError: for a world or an estimator's argument that does not exist or is out of range.
    """
    together = [list(found) for _, found in groupby(cells, key=lambda cell: (cell.sweep, cell.world, cell.m))]
    for spec in specs:  # wrong arguments are reported before the work begins
        first = together[0][0]
        spec.build(m=first.m, target_n=first.target_n, alpha=first.alpha)
    worlds = {found[0].world: build_world(found[0].world) for found in together}
    rows: list[Row] = []
    for found in tqdm(together, unit="world", desc="fidelity", disable=not progress, leave=False):
        rows += _measure_together(worlds[found[0].world], found, specs, groups=groups, seed=seed)
    return rows


def _measure_together(
    world: World, cells: Sequence[Cell], specs: Sequence[EstimatorSpec], *, groups: int, seed: int
) -> list[Row]:
    m = cells[0].m
    jobs = [(cell, spec, _key(cell, spec)) for cell in cells for spec in specs if takes_part(spec, cell.sweep)]
    # Without N and alpha an estimator is the same in every cell.
    built = {key: spec.build(m=m, target_n=cell.target_n, alpha=cell.alpha) for cell, spec, key in jobs}
    lowest = float(world.sample(64, m, torch.Generator().manual_seed(seed))[0].min())
    trials = {key: try_out(estimator, m, lowest) for key, estimator in built.items()}
    accepted = {key: estimator for key, estimator in built.items() if not trials[key].refused}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `trials` holds them
        gradients = group_gradients(accepted, world, m, groups=groups, seed=seed)
    controls = _controls(world, cells[0], groups, seed) if cells[0].sweep == "m" else None
    rows = []
    for cell, spec, key in jobs:
        row, truth = _row(cell, spec, trials[key]), world.exact_gradient(cell.target_n)
        if key in gradients:
            row |= fidelity(gradients[key], truth, world.directions).flat()
            if controls is not None:
                row |= _controlled_bias(gradients[key].gradients, controls, truth)
        rows.append(row)
    return rows


def _key(cell: Cell, spec: EstimatorSpec) -> str:
    return f"{spec.name}{spec.all_arguments(m=cell.m, target_n=cell.target_n, alpha=cell.alpha)}"


def _row(cell: Cell, spec: EstimatorSpec, trial: Trial) -> Row:
    return {
        "sweep": cell.sweep,
        "world": cell.world,
        "estimator": spec.label,
        "m": cell.m,
        "target_n": cell.target_n,
        "alpha": cell.alpha,
        "units": "" if trial.refused else "reward" if trial.reward_units else "own",
        "note": trial.refused or trial.warned,
    }


def _controls(world: World, cell: Cell, groups: int, seed: int) -> Tensor:
    assert isinstance(world, Latent), "control variates need the latent"
    chunks = sample_chunks(world, cell.m, groups=groups, seed=seed)
    return torch.cat([group_controls(scores[..., 0], cell.alpha) for _, scores in chunks])


def _controlled_bias(gradients: Tensor, controls: Tensor, truth: Tensor) -> Row:
    """A norm several times more precise than `bias`: see `tealightning.diagnostics.slopes`."""
    mean, covariance = controlled_mean(gradients, controls)
    bias, error = norm_of_mean(mean - truth, covariance)
    return {"controlled_bias": bias, "controlled_bias_se": error}
