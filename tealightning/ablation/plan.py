"""Expand a spec into runs: every (variant, seed) with the configuration that `tealightning fit` would take."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tealightning.ablation.run_configs import config_hash, run_config, start_config, with_seed
from tealightning.ablation.spec import AblationSpec, filled, placeholders
from tealightning.errors import UserError

Resolve = Callable[[Sequence[str]], dict[str, Any]]
"""Arguments of `tealightning fit` -> the configuration that they amount to; raises ValueError where there is none."""


@dataclass(kw_only=True, slots=True)
class Variant:
    """One line of the tables: a variant at one point of the grid."""

    name: str  # as in tables: "tea" or "tea[m=16,n=64]"
    base: str  # as in the spec: "tea"
    point: dict[str, Any]  # the grid's values that it uses
    settings: dict[str, Any]  # by dotted key
    reference: str | None  # name of the variant that it is compared with; None = it is a reference itself


@dataclass(kw_only=True, slots=True)
class Job:
    """One run: training a variant with a seed, or evaluating the policy that training starts from."""

    kind: Literal["fit", "start"]
    variant: str  # of a start: the first variant that needs it
    seed: int
    config: dict[str, Any]  # of `tealightning fit`, the run's folder left open
    hash: str  # of config and local inputs
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant if self.kind == 'fit' else 'starting policy'}, seed {self.seed}"


@dataclass(kw_only=True, slots=True)
class Plan:
    """All runs of an ablation."""

    spec: AblationSpec
    variants: list[Variant]
    jobs: dict[tuple[str, int], Job]  # (variant, seed) -> its training run
    starts: dict[tuple[str, int], Job]  # (variant, seed) -> the evaluation that its run is paired with

    @property
    def all_jobs(self) -> list[Job]:
        """Every run once: evaluations of starting policies first, then seed by seed, so that an unfinished ablation has
        whole comparisons."""
        starts = {job.folder: job for job in self.starts.values()}
        by_seed = sorted(self.jobs.values(), key=lambda job: self.spec.seeds.index(job.seed))
        return [*starts.values(), *by_seed]


def expand(spec: AblationSpec) -> list[Variant]:
    """The variants at every point of the grid that they use.

    Raises:
        ValueError: if the reference is no variant, or uses an axis that another variant does not.
    """
    if spec.reference not in spec.variants:
        raise UserError(f"reference must be one of the variants {', '.join(spec.variants)}, got {spec.reference!r}.")
    merged = {name: {**spec.settings, **settings} for name, settings in spec.variants.items()}
    axes = {name: [a for a in spec.grid if a in placeholders(settings)] for name, settings in merged.items()}
    reference_axes = axes[spec.reference]
    variants = []
    for name, settings in merged.items():
        if missing := [axis for axis in reference_axes if axis not in axes[name]]:
            raise UserError(
                f"the reference {spec.reference} differs along {{{missing[0]}}} and {name} does not: there is nothing "
                "to compare it with."
            )
        for point in _points(spec, axes[name]):
            reference = _named(spec.reference, {axis: point[axis] for axis in reference_axes})
            own = _named(name, point)
            variants.append(
                Variant(
                    name=own,
                    base=name,
                    point=point,
                    settings=filled(settings, point),
                    reference=None if own == reference else reference,
                )
            )
    return variants


def make_plan(spec: AblationSpec, resolve: Resolve, notify: Callable[[Variant], None] = lambda variant: None) -> Plan:
    """Resolve and check every variant, before anything runs.

    Args:
        spec: What to compare.
        resolve: From arguments of `fit` to a configuration.
        notify: Called before each variant.

    Raises:
        ValueError: for a variant that cannot be run, with its name.
    """
    variants = expand(spec)
    jobs: dict[tuple[str, int], Job] = {}
    starts: dict[tuple[str, int], Job] = {}
    fingerprints: dict[str, str] = {}
    for variant in variants:
        notify(variant)
        try:
            config = run_config(spec, resolve(arguments(spec, variant)))
        except (ValueError, TypeError) as error:
            raise UserError(f"variant {variant.name}: {error}") from error
        for seed in spec.seeds:
            seeded = with_seed(config, seed)
            jobs[variant.name, seed] = _job(spec, "fit", variant.name, seed, seeded, fingerprints)
            starts[variant.name, seed] = _job(spec, "start", variant.name, seed, start_config(seeded), fingerprints)
    return Plan(spec=spec, variants=variants, jobs=jobs, starts=starts)


def arguments(spec: AblationSpec, variant: Variant) -> list[str]:
    """Arguments of `tealightning fit` for the variant, without what the ablation imposes."""
    configs = [part for path in spec.base for part in ("-c", path)]
    return [*configs, *(f"--{key}={_text(value)}" for key, value in variant.settings.items())]


def _job(
    spec: AblationSpec,
    kind: Literal["fit", "start"],
    variant: str,
    seed: int,
    config: dict[str, Any],
    fingerprints: dict[str, str],
) -> Job:
    digest = config_hash(config, fingerprints)
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", variant).strip("_") if kind == "fit" else "start"
    folder = spec.folder / "runs" / name / f"seed{seed}-{digest}"
    return Job(kind=kind, variant=variant, seed=seed, config=config, hash=digest, folder=folder)


def _points(spec: AblationSpec, axes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(spec.grid[axis] for axis in axes)):
        yield dict(zip(axes, values, strict=True))


def _named(base: str, point: Mapping[str, Any]) -> str:
    return f"{base}[{','.join(f'{axis}={value}' for axis, value in point.items())}]" if point else base


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
