"""Rewards above their mean, in units of that mean: maximum likelihood of a success."""

from torch import Tensor

from tealightning.checks import check_positive
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class MaxRL(AdvantageEstimator):
    """Centred rewards in units of their mean (MaxRL, Tajwar et al. 2026, arXiv 2602.02710):

        A_i = (R_i - mean) / (mean + eps)

    For 0/1 rewards, p the probability of a success, `grad log p = sum_k (1/k) grad pass@k`: prompts on which successes
    are rare count more. With m rollouts and eps = 0 it is unbiased for the sum up to k = m - 1. Scores in [0, 1] are
    taken as they are, which follows `log E[R]`, with a bias at finite m. A constant group gets zeros; negative rewards
    are a ValueError: a mean near 0, or below, would blow the advantages up or turn their sign.

    Args:
        eps: Added to the mean, > 0, in units of reward: keep it far below 1/m of a success.
    """

    objective = "log P(success)"
    min_group_size = 2  # one rollout never exceeds its own mean
    lowest_reward = 0.0
    rewards_advice = (
        "it divides by their mean. For the scores of a reward model take tail_rl, which is the same on 0/1 rewards and "
        "takes any others; or let the reward return 0/1, or a score in [0, 1]."
    )

    def __init__(self, *, eps: float = 1e-6) -> None:
        self.eps = check_positive("eps", eps)

    def compute(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (rewards.mean(dim=1, keepdim=True) + self.eps)
