"""Group-relative advantages: rewards standardised within the group."""

from torch import Tensor

from tealightning.checks import check_positive
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.moments import centred, sample_std
from tealightning.registry import register


@register
class GRPO(AdvantageEstimator):
    """Rewards standardised by the group's sample standard deviation (DeepSeekMath, Shao et al. 2024):

        A_i = (R_i - mean) / (std + eps)

    The field's default. Dividing by the group's own spread weighs prompts alike whatever their reward scale, and is
    no unbiased gradient of any objective. A constant group gets zeros.

    Args:
        eps: Added to the standard deviation, > 0, in units of reward: groups with a smaller spread fade out.
    """

    objective = "E[R] (standardised)"
    min_group_size = 2  # one rollout has no spread

    def __init__(self, *, eps: float = 1e-4) -> None:
        self.eps = check_positive("eps", eps)

    def compute(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (sample_std(rewards) + self.eps)
