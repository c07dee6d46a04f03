"""Two-arm decision problem: an arm with the better mean against an arm with the better best-of-N."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_ndtr, ndtr
from torch import Generator, Tensor

from tealightning.diagnostics.worlds import World

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
            raise ValueError(f"{self.name}: the probability of B must be in (0, 1), got {self.probability}.")

    def sample(self, prompts: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `World.sample`."""
        uniform = torch.rand(prompts, m, generator=generator, dtype=torch.float64)
        arms = (uniform < self.probability).double()
        return draw_rewards(arms, generator), (arms - self.probability)[..., None]

    def exact_gradient(self, target_n: int) -> Tensor:
        """See `World.exact_gradient`."""
        p = self.probability
        nodes, weights = np.polynomial.legendre.leggauss(20)
        edges = np.linspace(MEAN_B - 14 * SD_B, MEAN_B + 14 * SD_B, 601)  # wider than 14 sd of A as well
        half = np.diff(edges)[:, None] / 2
        x, weights = ((edges[:-1, None] + half) + half * nodes).ravel(), (half * weights).ravel()
        log_below = np.logaddexp(np.log1p(-p) + log_ndtr(x), np.log(p) + log_ndtr((x - MEAN_B) / SD_B))
        # F_A - F_B from whichever tails are small
        z = (x - MEAN_B) / SD_B
        difference = np.where(x > 0, ndtr(-z) - ndtr(-x), ndtr(x) - ndtr(z))
        integral = np.sum(weights * target_n * np.exp((target_n - 1) * log_below) * difference)
        return torch.tensor([p * (1 - p) * integral], dtype=torch.float64)
