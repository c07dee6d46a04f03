"""Parse estimators as named on the command line: `tea`, `prefix_tea:rotations=1`, `direct:tail=gpd,alpha=0.5`."""

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

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
            raise ValueError(f"--estimators: expected NAME or NAME:PARAMETER=VALUE,..., got {text!r}.")
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
