"""Models of the upper tail, each with the plug-in weights of the gradient of its best-of-N.

- `gaussian`: the upper tail is Gaussian (`functional.tail`);
- `gpd`: it is generalised Pareto, with a shape of its own (`functional.gpd_tail`);
- `empirical`: no model and no extrapolation, what the m samples can say (here).
"""

from typing import Literal

import torch
from torch import Tensor

from tealightning.functional.gpd_tail import gpd_weights
from tealightning.functional.max_at_k import gaps_and_ranks, subset_shares
from tealightning.functional.tail import direct_weights, tail_size

TailModel = Literal["gaussian", "gpd", "empirical"]

TAIL_MODELS: tuple[TailModel, ...] = ("gaussian", "gpd", "empirical")


def tail_weights(rewards: Tensor, *, target_n: int, alpha: float, tail: TailModel) -> Tensor:
    """Plug-in weights of the gradient of E[max of N] from the top `k = ceil(alpha m)` rollouts; 0 for the others.

    Args:
        rewards: [P, m] float64, finite.
        target_n: N of the objective.
        alpha: Upper-tail level in (0, 1].
        tail: Model of the tail.

    Returns:
        [P, m] float64; zeros where the tail has no spread.
    """
    weights = {"gaussian": direct_weights, "gpd": gpd_weights, "empirical": empirical_weights}[tail]
    return weights(rewards, target_n=target_n, alpha=alpha)


def empirical_weights(rewards: Tensor, *, target_n: int, alpha: float) -> Tensor:
    """`A_(i) = sum over the gaps above the threshold and below i of (R_(l+1) - R_(l)) * m C(l, n-1)/C(m, n)`, n =
    min(N, m).

    The exact influence function of `E[max of N]` is `w(u) = integral up to u of N F(x)^(N-1) dx`. Here `N F^(N-1)` is
    replaced by its unbiased estimate in each gap between neighbouring rewards, for the largest budget that m samples
    can measure, and gaps below the k-th largest reward, where `N F^(N-1)` is below `N (1-alpha)^(N-1)`, are left out.
    With `alpha = 1` and N <= m these are the weights of max@N (`functional.max_at_k.max_at_k_loo_weights`).
    """
    m = rewards.shape[-1]
    gaps, rank = gaps_and_ranks(rewards)
    shares = subset_shares(m, min(target_n, m))[1:].to(rewards.device)
    counted = torch.arange(m - 1, device=rewards.device) >= m - tail_size(alpha, m)
    below = (gaps * shares * counted).cumsum(-1)
    return torch.cat([below.new_zeros(len(below), 1), below], dim=-1).gather(-1, rank)
