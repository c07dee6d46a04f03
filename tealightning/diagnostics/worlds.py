"""Worlds in which the exact gradient of `V_N = E[max of N rewards]` is known.

A world is a policy with d parameters, called `directions`, and a reward. `sample` draws independent groups of rollouts:
their rewards [P, m] and scores [P, m, d] (`S_i = grad log pi`). `exact_gradient` is that of V_N, [d], by quadrature to
about 1e-9: what every estimator's `(1/m) * sum_i A_i S_i` is held against. All numbers are float64.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.special import log_ndtr, ndtr, stdtrit
from torch import Generator, Tensor

from tealightning.errors import UserError
from tealightning.registry import did_you_mean

Function = Callable[[np.ndarray], np.ndarray]  # elementwise, of float64 arrays of any shape


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


class LatentWorld(NamedTuple):
    """A normal latent z with scores `(z, z^2 - 1)` and a reward `g(z)` that never falls.

    The best of N is `g(M)` with M the maximum of N normals, so

        grad V_N = integral of g(x) f(x) (u, x u - 1) dx,    f = N phi Phi^(N-1),   u = -f'/f = x - (N-1) phi/Phi

    which needs no derivative of g. For steps of 1 at `edges` e_j it is a sum, `sum_j f(e_j) (1, e_j)`. For `g = id` it
    is `(1, c_N)`.
    """

    name: str
    reward: Function  # g, on [-14, 14]
    edges: tuple[float, ...] = ()  # empty: g is smooth
    directions: tuple[str, ...] = ("location", "log-scale")

    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Rewards and scores; `scores[..., 0]` is the latent."""
        z = torch.randn(prompts, m, generator=generator, dtype=torch.float64)
        return torch.from_numpy(self.reward(z.numpy())), torch.stack([z, z * z - 1], dim=-1)

    def exact_gradient(self, target_n: int) -> Tensor:
        if self.edges:
            edges = np.asarray(self.edges)
            density = max_density(edges, target_n)
            return torch.tensor([np.sum(density), np.sum(density * edges)], dtype=torch.float64)
        x, weights = quadrature(-14.0, 14.0, 280)  # phi at 14 is 1e-43
        u = x - (target_n - 1) * np.exp(log_phi(x) - log_ndtr(x))
        values = weights * self.reward(x) * max_density(x, target_n)
        return torch.tensor([np.sum(values * u), np.sum(values * (x * u - 1))], dtype=torch.float64)


def gpd_quantile(z: np.ndarray, shape: float) -> np.ndarray:
    """Generalised Pareto quantile (scale 1) of `Phi(z)`: `((1 - Phi(z))^-shape - 1)/shape`; exponential for shape 0."""
    log_survival = log_ndtr(-z)  # log(1 - Phi(z)), without cancellation
    return -log_survival if shape == 0 else np.expm1(-shape * log_survival) / shape


_GRID = np.linspace(-14.25, 14.25, 8193)


def quantile_spline(quantiles: np.ndarray, density: Function) -> CubicHermiteSpline:
    """The quantile function at `Phi(z)`, interpolated between its values at `_GRID` with its slope `phi(z)/density`."""
    return CubicHermiteSpline(_GRID, quantiles, np.exp(log_phi(_GRID)) / density(quantiles))


def student_quantile(degrees: int) -> CubicHermiteSpline:
    """Quantile of Student's t at `Phi(z)`: symmetric, with tail index 1/degrees."""
    normaliser = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    # both tails from their small probability
    quantiles = np.sign(_GRID) * -stdtrit(degrees, ndtr(-np.abs(_GRID)))
    return quantile_spline(quantiles, lambda r: normaliser * (1 + r * r / degrees) ** (-(degrees + 1) / 2))


class NormalMixture(NamedTuple):
    """`sum_j weight_j N(mean_j, sd_j^2)`."""

    parts: tuple[tuple[float, float, float], ...]  # (weight, mean, sd)

    def density(self, r: np.ndarray) -> np.ndarray:
        return sum((w / sd * np.exp(log_phi((r - mean) / sd)) for w, mean, sd in self.parts), np.zeros_like(r))

    def below(self, r: np.ndarray) -> np.ndarray:
        """P(R <= r), accurate in the lower tail."""
        return sum((w * ndtr((r - mean) / sd) for w, mean, sd in self.parts), np.zeros_like(r))

    def above(self, r: np.ndarray) -> np.ndarray:
        """P(R > r), accurate in the upper tail."""
        return sum((w * ndtr(-((r - mean) / sd)) for w, mean, sd in self.parts), np.zeros_like(r))

    def quantile(self, z: np.ndarray) -> np.ndarray:
        """The r with P(R <= r) = Phi(z), by bisection on whichever tail is the smaller."""
        low, high = np.full_like(z, -100.0), np.full_like(z, 100.0)
        for _ in range(80):
            r = (low + high) / 2
            too_low = np.where(z > 0, self.above(r) > ndtr(-z), self.below(r) < ndtr(z))
            low, high = np.where(too_low, r, low), np.where(too_low, high, r)
        return (low + high) / 2


# A bulk and a narrow group of better answers: the upper tail is no Gaussian's until far out.
MIXTURE = NormalMixture(((0.85, 0.0, 1.0), (0.15, 2.0, 0.5)))
# Arm A is N(0, 1), arm B N(-1.406, 1.6^2): A has the larger mean and best-of-16, B the larger best-of-128.
MEAN_B, SD_B = -1.406, 1.6


def draw_rewards(arms: Tensor, generator: Generator) -> Tensor:
    """A reward for each rollout; `arms` [...] float64 is 1 where it plays B and 0 where it plays A."""
    z = torch.randn(arms.shape, generator=generator, dtype=torch.float64)
    return z + arms * (MEAN_B + (SD_B - 1) * z)


class TwoArms(NamedTuple):
    """A softmax policy over the two arms with one parameter, the logit of B.

    `S = 1{B} - p`. With `F = (1-p) F_A + p F_B` the gradient is `p (1-p) * integral of N F^(N-1) (F_A - F_B)`.
    """

    name: str
    probability: float  # p, of B
    directions: tuple[str, ...] = ("logit of B",)

    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(prompts, m, generator=generator, dtype=torch.float64)
        arms = (uniform < self.probability).double()
        return draw_rewards(arms, generator), (arms - self.probability)[..., None]

    def exact_gradient(self, target_n: int) -> Tensor:
        p = self.probability
        x, weights = quadrature(MEAN_B - 14 * SD_B, MEAN_B + 14 * SD_B, 600)  # wider than 14 sd of A as well
        z = (x - MEAN_B) / SD_B
        log_below = np.logaddexp(np.log1p(-p) + log_ndtr(x), np.log(p) + log_ndtr(z))
        difference = np.where(x > 0, ndtr(-z) - ndtr(-x), ndtr(x) - ndtr(z))  # F_A - F_B from the small tails
        integral = np.sum(weights * target_n * np.exp((target_n - 1) * log_below) * difference)
        return torch.tensor([p * (1 - p) * integral], dtype=torch.float64)


World = LatentWorld | TwoArms

# Edges of whole-number rewards with many ties, as a judge's marks.
MARKS = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
LATENT_WORLDS: dict[str, Callable[[], Function]] = {
    "gaussian": lambda: np.copy,
    "student_t5": lambda: student_quantile(5),
    "mixture": lambda: quantile_spline(MIXTURE.quantile(_GRID), MIXTURE.density),
    "bounded": lambda: np.tanh,
    "discrete": lambda: lambda z: np.searchsorted(MARKS, z, side="right").astype(np.float64),
}
# Those that are measured unless others are asked for.
NAMES = ("gaussian", "gpd_-0.3", "gpd_0", "gpd_0.2", "student_t5", "mixture", "bounded", "discrete", "two_arms")


def build_world(name: str) -> World:
    """Build a world: one of `NAMES`, `gpd_SHAPE` with any shape below 0.5 (the tail index of generalised Pareto
    rewards: bounded below 0, exponential at 0, heavy above), or `two_arms_P` with P the probability of arm B."""
    if name in LATENT_WORLDS:
        return LatentWorld(name=name, reward=LATENT_WORLDS[name](), edges=MARKS if name == "discrete" else ())
    match = re.fullmatch(r"(gpd|two_arms)_(-?\d*\.?\d+)", "two_arms_0.5" if name == "two_arms" else name)
    if match is None:
        raise UserError(f"Unknown world {name!r}.{did_you_mean(name, [*NAMES, 'gpd_SHAPE', 'two_arms_P'])}")
    value = float(match[2])
    if match[1] == "gpd":
        if not -2 <= value < 0.5:
            raise UserError(f"{name}: the shape must be in [-2, 0.5) (there is no variance from 0.5 on), got {value}.")
        return LatentWorld(name=name, reward=partial(gpd_quantile, shape=value))
    if not 0 < value < 1:
        raise UserError(f"{name}: the probability of B must be in (0, 1), got {value}.")
    return TwoArms(name=name, probability=value)
