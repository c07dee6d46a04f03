"""Worlds in which the exact gradient of `V_N = E[max of N rewards]` is known.

A world draws groups of rollouts, their rewards and their scores (`S_i = grad log pi`, in a handful of directions), and
computes the gradient of V_N by quadrature: what every estimator's `(1/m) * sum_i A_i S_i` is held against.

At (0, 0) the scores are `z` and `z^2 - 1`. The best of N is `g(M)` with M the maximum of N normals (g never falls), so

    grad V_N = integral of g(x) f(x) (u, x u - 1) dx,    f = N phi Phi^(N-1),   u = -f'/f = x - (N-1) phi/Phi

which needs no derivative of g. For steps of height h_j at e_j it is a sum, `sum_j h_j f(e_j) (1, e_j)`.
For `g = id` it is `(1, c_N)`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.special import log_ndtr, ndtr, stdtrit
from torch import Generator, Tensor

from tealightning.errors import UserError
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


def quadrature(low: float, high: float, panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [low, high]: Gauss-Legendre of 20 nodes in panels of equal width."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(low, high, panels + 1)
    half = np.diff(edges)[:, None] / 2
    return ((edges[:-1, None] + half) + half * nodes).ravel(), (half * weights).ravel()


def log_phi(x: np.ndarray) -> np.ndarray:
    """Logarithm of the standard normal density."""
    return -0.5 * x * x - 0.5 * np.log(2 * np.pi)


def max_density(x: np.ndarray, n: int) -> np.ndarray:
    """Density of the maximum of n standard normals."""
    return n * np.exp(log_phi(x) + (n - 1) * log_ndtr(x))


class Latent(World):
    """A normal latent z with scores `(z, z^2 - 1)` and the reward `reward(z)`."""

    directions: tuple[str, ...] = ("location", "log-scale")
    reward: Callable[[np.ndarray], np.ndarray]

    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `World.sample`; `scores[..., 0]` is the latent."""
        z = torch.randn(prompts, m, generator=generator, dtype=torch.float64)
        return torch.from_numpy(self.reward(z.numpy())), torch.stack([z, z * z - 1], dim=-1)


@dataclass(frozen=True, kw_only=True)
class SmoothWorld(Latent):
    """`R = g(z)` for an increasing smooth g.

    Args:
        name: Its name.
        reward: g, of float64 arrays of any shape, on [-14, 14].
    """

    name: str
    reward: Callable[[np.ndarray], np.ndarray]

    def exact_gradient(self, target_n: int) -> Tensor:
        """See `World.exact_gradient`."""
        x, weights = quadrature(-14.0, 14.0, 280)  # phi at 14 is 1e-43
        u = x - (target_n - 1) * np.exp(log_phi(x) - log_ndtr(x))
        values = weights * self.reward(x) * max_density(x, target_n)
        return torch.tensor([np.sum(values * u), np.sum(values * (x * u - 1))], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class SteppedWorld(Latent):
    """`R` = number of edges below z: whole numbers with many ties, as a judge's marks.

    Args:
        name: Its name.
        edges: Where the reward steps up by 1, rising.
    """

    name: str
    edges: tuple[float, ...]

    def reward(self, z: np.ndarray) -> np.ndarray:  # type: ignore[override]
        """0 .. len(edges)."""
        return np.searchsorted(np.asarray(self.edges), z, side="right").astype(np.float64)

    def exact_gradient(self, target_n: int) -> Tensor:
        """See `World.exact_gradient`."""
        edges = np.asarray(self.edges)
        density = max_density(edges, target_n)
        return torch.tensor([np.sum(density), np.sum(density * edges)], dtype=torch.float64)


def gpd_quantile(z: np.ndarray, shape: float) -> np.ndarray:
    """Generalised Pareto quantile (scale 1) of `Phi(z)`: `((1 - Phi(z))^-shape - 1)/shape`; exponential for shape 0."""
    log_survival = log_ndtr(-z)  # log(1 - Phi(z)), without cancellation
    return -log_survival if shape == 0 else np.expm1(-shape * log_survival) / shape


def gpd_world(name: str, shape: float) -> SmoothWorld:
    """The reward is generalised Pareto with this tail index: bounded below 0, exponential at 0, heavy above.

    Raises:
        UserError: for a shape of 0.5 or more (no variance) or below -2.
    """
    if not -2 <= shape < 0.5:
        raise UserError(f"{name}: the shape must be in [-2, 0.5) (from 0.5 on a reward has no variance), got {shape}.")
    return SmoothWorld(name=name, reward=partial(gpd_quantile, shape=shape))


_GRID = np.linspace(-14.25, 14.25, 8193)


def quantile_spline(quantiles: np.ndarray, density: Callable[[np.ndarray], np.ndarray]) -> CubicHermiteSpline:
    """The quantile function at `Phi(z)`, interpolated in z with its exact slope `phi(z)/density`.

    Args:
        quantiles: Its values at z = `_GRID`.
        density: The density of the reward.
    """
    return CubicHermiteSpline(_GRID, quantiles, np.exp(log_phi(_GRID)) / density(quantiles))


def student_world(name: str, degrees: int) -> SmoothWorld:
    """The reward is Student's t: symmetric, with tail index 1/degrees."""
    normaliser = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(r: np.ndarray) -> np.ndarray:
        return normaliser * (1 + r * r / degrees) ** (-(degrees + 1) / 2)

    # both tails from their small probability
    quantiles = np.sign(_GRID) * -stdtrit(degrees, ndtr(-np.abs(_GRID)))
    return SmoothWorld(name=name, reward=quantile_spline(quantiles, density))


@dataclass(frozen=True, kw_only=True)
class NormalMixture:
    """`sum_j weights_j N(means_j, sds_j^2)`."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    sds: tuple[float, ...]

    def _parts(self, r: np.ndarray) -> list[tuple[float, np.ndarray, float]]:
        return [(w, (r - mu) / sd, sd) for w, mu, sd in zip(self.weights, self.means, self.sds, strict=True)]

    def density(self, r: np.ndarray) -> np.ndarray:
        """Its density."""
        return sum((w / sd * np.exp(log_phi(x)) for w, x, sd in self._parts(r)), np.zeros_like(r))

    def below(self, r: np.ndarray) -> np.ndarray:
        """P(R <= r), accurate in the lower tail."""
        return sum((w * ndtr(x) for w, x, _ in self._parts(r)), np.zeros_like(r))

    def above(self, r: np.ndarray) -> np.ndarray:
        """P(R > r), accurate in the upper tail."""
        return sum((w * ndtr(-x) for w, x, _ in self._parts(r)), np.zeros_like(r))

    def quantile(self, z: np.ndarray) -> np.ndarray:
        """The r with P(R <= r) = Phi(z), by bisection on whichever tail is the smaller."""
        low, high = np.full_like(z, -100.0), np.full_like(z, 100.0)
        for _ in range(80):
            r = (low + high) / 2
            too_low = np.where(z > 0, self.above(r) > ndtr(-z), self.below(r) < ndtr(z))
            low, high = np.where(too_low, r, low), np.where(too_low, high, r)
        return (low + high) / 2


MIXTURE = NormalMixture(weights=(0.85, 0.15), means=(0.0, 2.0), sds=(1.0, 0.5))
"""A bulk and a narrow group of better answers: the upper tail is no Gaussian's until far out."""

MEAN_B, SD_B = -1.406, 1.6
"""Arm A is N(0, 1), arm B N(-1.406, 1.6^2): A has the larger mean and best-of-16, B the larger best-of-128."""


def draw_rewards(arms: Tensor, generator: Generator) -> Tensor:
    """A reward for each rollout.

    Args:
        arms: [...] float64, 1 where the rollout plays B and 0 where it plays A.
    """
    z = torch.randn(arms.shape, generator=generator, dtype=torch.float64)
    return z + arms * (MEAN_B + (SD_B - 1) * z)


@dataclass(frozen=True, kw_only=True)
class TwoArms(World):
    """A softmax policy over the two arms with one parameter, the logit of B.

    `S = 1{B} - p`. With `F = (1-p) F_A + p F_B` the gradient is `p (1-p) * integral of N F^(N-1) (F_A - F_B)`.

    Args:
        name: Its name.
        probability: p, of B, in (0, 1).
    """

    name: str
    probability: float
    directions: tuple[str, ...] = ("logit of B",)

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise UserError(f"{self.name}: the probability of B must be in (0, 1), got {self.probability}.")

    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `World.sample`."""
        uniform = torch.rand(prompts, m, generator=generator, dtype=torch.float64)
        arms = (uniform < self.probability).double()
        return draw_rewards(arms, generator), (arms - self.probability)[..., None]

    def exact_gradient(self, target_n: int) -> Tensor:
        """See `World.exact_gradient`."""
        p = self.probability
        # wider than 14 standard deviations of A as well
        x, weights = quadrature(MEAN_B - 14 * SD_B, MEAN_B + 14 * SD_B, 600)
        z = (x - MEAN_B) / SD_B
        log_below = np.logaddexp(np.log1p(-p) + log_ndtr(x), np.log(p) + log_ndtr(z))
        # F_A - F_B from whichever tails are small
        difference = np.where(x > 0, ndtr(-z) - ndtr(-x), ndtr(x) - ndtr(z))
        integral = np.sum(weights * target_n * np.exp((target_n - 1) * log_below) * difference)
        return torch.tensor([p * (1 - p) * integral], dtype=torch.float64)


LATENT_WORLDS: dict[str, Callable[[], World]] = {
    "gaussian": lambda: SmoothWorld(name="gaussian", reward=np.copy),
    "student_t5": lambda: student_world("student_t5", 5),
    "mixture": lambda: SmoothWorld(name="mixture", reward=quantile_spline(MIXTURE.quantile(_GRID), MIXTURE.density)),
    "bounded": lambda: SmoothWorld(name="bounded", reward=np.tanh),
    "discrete": lambda: SteppedWorld(name="discrete", edges=(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)),
}
NAMES = ("gaussian", "gpd_-0.3", "gpd_0", "gpd_0.2", "student_t5", "mixture", "bounded", "discrete", "two_arms")
"""The worlds that are measured unless others are asked for."""


def build_world(name: str) -> World:
    """Build a world: one of `NAMES`, `gpd_SHAPE` with any shape below 0.5, or `two_arms_P` with P the probability of
    arm B (0.5 without it).

    Raises:
        UserError: for an unknown name, with the nearest valid ones; for a shape or a probability out of range.
    """
    if name in LATENT_WORLDS:
        return LATENT_WORLDS[name]()
    if name == "two_arms":
        return TwoArms(name=name, probability=0.5)
    match = re.fullmatch(r"(gpd|two_arms)_(-?\d*\.?\d+)", name)
    if match is None:
        raise UserError(f"Unknown world {name!r}.{did_you_mean(name, [*NAMES, 'gpd_SHAPE', 'two_arms_P'])}")
    if match[1] == "gpd":
        return gpd_world(name, float(match[2]))
    return TwoArms(name=name, probability=float(match[2]))
