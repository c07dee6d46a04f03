"""Worlds in which the exact gradient of `V_N = E[max of N rewards]` is known.

A world draws groups of rollouts, their rewards and their scores (`S_i = grad log pi`, in a handful of directions), and
computes the gradient of V_N by quadrature: what every estimator's `(1/m) * sum_i A_i S_i` is held against.
"""

import re
from abc import ABC, abstractmethod

from torch import Generator, Tensor

from tealightning.registry import did_you_mean


class World(ABC):
    """A policy with d parameters and a reward.

    Attributes:
        name: Its name on the command line and in tables.
        directions: What the d parameters are called.
    """

    name: str
    directions: tuple[str, ...]

    @abstractmethod
    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Rewards [prompts, m] float64 and scores [prompts, m, d] float64 of independent groups."""

    @abstractmethod
    def exact_gradient(self, target_n: int) -> Tensor:
        """Gradient of `E[max of target_n rewards]`: [d] float64, accurate to about 1e-9."""


NAMES = (
    "gaussian",
    "gpd_-0.3",
    "gpd_0",
    "gpd_0.2",
    "student_t5",
    "mixture",
    "bounded",
    "discrete",
    "two_arms",
)
"""The worlds that are measured unless others are asked for."""

_SHAPE_OR_PROBABILITY = re.compile(r"(gpd|two_arms)_(-?\d*\.?\d+)")


def build_world(name: str) -> World:
    """The world called `name`: one of `NAMES`, `gpd_SHAPE` with any shape below 0.5, or `two_arms_P` with P the
    probability of arm B (0.5 without it).

    Raises:
        ValueError: for an unknown name, with the nearest valid ones; for a shape or a probability out of range.
    """
    from tealightning.diagnostics.latent_worlds import LATENT_WORLDS, gpd_world
    from tealightning.diagnostics.two_arms import TwoArms

    if name in LATENT_WORLDS:
        return LATENT_WORLDS[name]()
    if name == "two_arms":
        return TwoArms(name=name, probability=0.5)
    match = _SHAPE_OR_PROBABILITY.fullmatch(name)
    if match is None:
        raise ValueError(f"Unknown world {name!r}.{did_you_mean(name, [*NAMES, 'gpd_SHAPE', 'two_arms_P'])}")
    if match[1] == "gpd":
        return gpd_world(name, float(match[2]))
    return TwoArms(name=name, probability=float(match[2]))
