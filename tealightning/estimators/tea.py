"""Tail-extrapolated advantages: the plug-in weights in the form that training wants."""

from typing import Literal

from torch import Tensor

from tealightning.checks import check_choice
from tealightning.estimators._tail import PlugInEstimator
from tealightning.functional.moments import centred, ratio_or_zero, root_mean_square, sample_std
from tealightning.functional.tail import TailModel
from tealightning.registry import register


@register
class TEA(PlugInEstimator):
    """Weights `w` of `Direct` with a group baseline `b` and a group scale `s`:

        A_i = (w_i - b_i) / s

    - `baseline`: "none" keeps `m - k + 1` rollouts at exactly 0, whose forward and backward pass training then skips;
      "mean" subtracts `mean(w)`; "loo" the mean of the others' weights (`m/(m-1) * (w_i - mean(w))`).
    - `scale`: "none"; "reward_std", the sample standard deviation of the group's rewards; "rms", the root mean square
      of the group's weights `w` over all m. A scale makes prompts with different reward scales contribute alike, and
      the advantages invariant to the scale of the rewards.

    The defaults are measured: see docs/estimators/tea.md. A tail without spread gets zeros.

    Args:
        baseline: Baseline that is subtracted from the weights.
        scale: Scale that the weights are divided by.
    """

    def __init__(
        self,
        *,
        target_n: int = 128,
        alpha: float = 0.25,
        baseline: Literal["none", "mean", "loo"] = "none",
        scale: Literal["none", "reward_std", "rms"] = "reward_std",
        tail: TailModel = "gaussian",
    ) -> None:
        super().__init__(target_n=target_n, alpha=alpha, tail=tail)
        self.baseline = check_choice("baseline", baseline, ("none", "mean", "loo"))
        self.scale = check_choice("scale", scale, ("none", "reward_std", "rms"))

    def compute(self, rewards: Tensor) -> Tensor:
        m = rewards.shape[1]
        weights = self.plug_in(rewards)
        advantages = weights
        if self.baseline != "none":
            advantages = centred(weights) * (m / (m - 1) if self.baseline == "loo" else 1.0)
        if self.scale == "none":
            return advantages
        scale = sample_std(rewards) if self.scale == "reward_std" else root_mean_square(weights, m)
        return ratio_or_zero(advantages, scale)
