"""Exponentially tilted weights of a group, and the tilt that moves it a given distance from uniform.

`kl_target` is that distance in nats.
"""

import math

import torch
from torch import Tensor

from tealightning.functional.moments import ratio_or_zero, sum_of_others

LARGEST_TILT = math.exp(80.0)
"""Cap of `exp(beta R_i) / mean of the others` at a fixed beta, so that the weights still fit float32."""

_LOG_BETA_BOUNDS = (math.log(1e-12), math.log(1e308))  # in units of 1/range; beyond, float64 sees no difference
_BISECTION_STEPS = 64  # halves a width of 740 below float64's resolution


def below_top(rewards: Tensor) -> Tensor:
    """Distance of each reward from the best in units of the range, in [-1, 0]; all 0 in a constant group:

        (R_i - max R) / (max R - min R)

    >>> below_top(torch.tensor([[1.0, 3.0, 5.0]]))
    tensor([[-1.0000, -0.5000,  0.0000]])
    """
    from_max = rewards - rewards.amax(dim=-1, keepdim=True)
    return ratio_or_zero(from_max, -from_max.amin(dim=-1, keepdim=True))


def _kl_to_uniform(logits: Tensor) -> Tensor:
    """`KL(softmax(logits) || uniform)` of finite logits in nats: [P, 1], from 0 to `ln m`."""
    log_probs = logits.log_softmax(dim=-1)
    return (log_probs.exp() * log_probs).sum(dim=-1, keepdim=True) + math.log(logits.shape[-1])


def adaptive_beta(positions: Tensor, kl_target: float) -> Tensor:
    """Tilt beta of a given divergence from uniform, by bisection of log beta: [P, 1] float64 with

        KL(softmax(beta x) || uniform) = kl_target

    for the positions x of `below_top`. The divergence rises with beta from 0 to `ln(m/t)`, t the number of rollouts
    tied at the top; where that is not above the target, the search is for nothing and beta is infinite.

    >>> adaptive_beta(torch.tensor([[-1.0, -0.5, 0.0]], dtype=torch.float64), kl_target=0.5)
    tensor([[3.1157]], dtype=torch.float64)
    """
    tied = (positions == 0).sum(dim=-1, keepdim=True)
    reachable = (positions.shape[-1] / tied).log() > kl_target + 1e-12
    low, high = (torch.full_like(positions[:, :1], bound) for bound in _LOG_BETA_BOUNDS)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        short = _kl_to_uniform(middle.exp() * positions) < kl_target
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.where(reachable, high.exp(), math.inf)


def leave_one_out_tilt(logits: Tensor) -> Tensor:
    """Leave-one-out exponential tilt, capped at `LARGEST_TILT`; exactly 0 if all are equal:

        exp(l_i) / mean_{j != i} exp(l_j) - 1

    The largest of each row of `logits` [P, m >= 2] is 0; -inf is allowed.

    >>> leave_one_out_tilt(torch.tensor([[0.5, 1.0]], dtype=torch.float64).log())
    tensor([[-0.5000,  1.0000]], dtype=torch.float64)
    """
    tilted = logits.exp()
    return (tilted * (logits.shape[-1] - 1) / sum_of_others(tilted)).clamp(max=LARGEST_TILT) - 1


def entropic_weights(rewards: Tensor, kl_target: float) -> Tensor:
    """Leave-one-out tilt at the group's own beta of `adaptive_beta`, for `ln m > kl_target`.

    An infinite beta, which needs t >= 2 rollouts tied at the top, gives these `(m-1)/(t-1) - 1` and all others -1.

    >>> entropic_weights(torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), kl_target=0.5)
    tensor([[-0.9267, -0.5967,  6.8450]], dtype=torch.float64)
    """
    positions = below_top(rewards)
    beta = adaptive_beta(positions, kl_target)
    return leave_one_out_tilt(torch.where(positions == 0, 0.0, beta * positions))
