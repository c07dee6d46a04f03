"""Cut a pool into halves and groups of m, for the oracle and the estimators."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.functional.max_at_k import max_at_k_loo_weights

THINNED = 1024
"""Most coordinates of simulated steps: enough for a cosine, and every layer has some of them."""


@dataclass(kw_only=True, slots=True)
class Half:
    """Half of a pool."""

    rewards: Tensor  # [Q, h] float64, all finite
    scores: Tensor  # [Q, h, D] float, projected grad log pi of each rollout

    def oracle(self, target_n: int) -> Tensor:
        """[Q, D] float64: the unbiased best-of-N gradient of each prompt, `(1/h) sum_i w_i s_i` with the weights of
        `max_at_k_loo_weights` at k = N."""
        weights = max_at_k_loo_weights(self.rewards, target_n) / self.rewards.shape[1]
        return torch.stack([each @ scores.double() for each, scores in zip(weights, self.scores, strict=True)])


def half_size(rewards: Tensor, *, smallest: int) -> int:
    """h, the size of the halves of every prompt's scored rollouts: half of what the prompt with the fewest has.

    Args:
        rewards: [Q, M] float; NaN = unscorable.
        smallest: Smallest h: the larger of N and m.

    Raises:
        ValueError: if h is smaller.
    """
    size = int(torch.isfinite(rewards).sum(dim=1).min()) // 2
    if size < smallest:
        raise UserError(
            f"pool: halves of {smallest} scored rollouts a prompt are needed (N, and the largest m), got {size}: "
            f"raise --pool to {2 * smallest} or more, or lower -N or -m."
        )
    return size


def split_halves(rewards: Tensor, scores: Tensor, size: int, generator: torch.Generator) -> tuple[Half, Half]:
    """Two disjoint random halves of `size` scored rollouts a prompt.

    Args:
        rewards: [Q, M] float; NaN = unscorable, in no half.
        scores: [Q, M, D].
    """
    order = torch.rand(rewards.shape, generator=generator).masked_fill(~torch.isfinite(rewards), 2.0).argsort(dim=1)
    halves = []
    for rows in (order[:, :size], order[:, size : 2 * size]):
        chosen = torch.stack([each[row] for each, row in zip(scores, rows, strict=True)])
        halves.append(Half(rewards=rewards.double().gather(1, rows), scores=chosen))
    return halves[0], halves[1]


def group_weights(half: Half, groups: Tensor, estimator: AdvantageEstimator) -> Tensor:
    """`A_i/m` of every rollout in its group: what its score vector counts in the group's gradient.

    Args:
        groups: [Q, G, m] indices of the half's rollouts.

    Returns:
        The same shape, float64.
    """
    rewards = torch.stack([each[rows] for each, rows in zip(half.rewards, groups, strict=True)])
    return (estimator(rewards.flatten(0, 1)) / groups.shape[-1]).view(rewards.shape)


def group_gradients(half: Half, groups: Tensor, weights: Tensor) -> Tensor:
    """`sum_i weights_i s_i` of every group: [Q, G, D], for groups and weights [Q, G, m]."""
    weights = weights.to(half.scores.dtype)[:, :, None]
    return torch.stack(
        [torch.bmm(each, scores[rows])[:, 0] for scores, rows, each in zip(half.scores, groups, weights, strict=True)]
    )


@dataclass(kw_only=True, slots=True)
class Cut:
    """A half in disjoint groups of m, with what all estimators need of it."""

    half: Half
    groups: Tensor  # [Q, G, m] int64
    products: Tensor  # [Q, G, m, m] inner products of the score vectors in each group
    thinned: Half  # every `stride`-th coordinate, at most THINNED

    @classmethod
    def of(cls, half: Half, m: int) -> "Cut":
        """Neighbours make a group: the order of a half is random."""
        num_prompts, size = half.rewards.shape
        num_groups = size // m
        groups = torch.arange(num_groups * m).view(1, num_groups, m).expand(num_prompts, -1, -1)
        members = half.scores[:, : num_groups * m].unflatten(1, (num_groups, m))
        products = torch.stack([each @ each.mT for each in members])
        thinned = Half(rewards=half.rewards, scores=half.scores[..., :: stride(half.scores.shape[-1])].contiguous())
        return cls(half=half, groups=groups, products=products, thinned=thinned)

    def mean_and_noise(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the groups' gradients [Q, D] and trace of the covariance of one group's [Q], both float64.

        The groups are independent, so the noise is their sample variance `(sum_g |e_g|^2 - G |mean|^2)/(G - 1)`; NaN
        for a single group.
        """
        num_groups = self.groups.shape[1]
        spread = weights.new_zeros(self.half.rewards.shape).scatter_(1, self.groups.flatten(1), weights.flatten(1))
        spread = (spread / num_groups).to(self.half.scores.dtype)
        mean = torch.stack([each @ scores for each, scores in zip(spread, self.half.scores, strict=True)]).double()
        lengths = torch.einsum("qgi,qgij,qgj->q", weights, self.products.double(), weights)
        if num_groups < 2:
            return mean, torch.full_like(lengths, float("nan"))
        return mean, (lengths - num_groups * mean.square().sum(dim=-1)).clamp(min=0) / (num_groups - 1)


def stride(num_features: int) -> int:
    """Which coordinates are kept of simulated steps: every one, or every second, ..."""
    return -(-num_features // THINNED)
