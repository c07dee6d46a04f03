"""Choose which combinations of world, m, N and alpha are measured, and make their rows."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tealightning.diagnostics.fidelity import fidelity, group_gradients, norm_of_mean, sample_chunks
from tealightning.diagnostics.latent_worlds import Latent
from tealightning.diagnostics.slopes import controlled_mean, group_controls
from tealightning.diagnostics.specs import EstimatorSpec, Trial, try_out
from tealightning.diagnostics.worlds import World, build_world

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
