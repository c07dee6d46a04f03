"""The best of k rollouts as objective, k up to the group size."""

import math
from typing import Literal

from torch import Tensor

from tealightning.checks import check_choice, check_integer
from tealightning.errors import UserError
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional import max_at_k
from tealightning.functional.moments import centred, ratio_or_zero, sample_std
from tealightning.registry import register


@register
class MaxAtK(AdvantageEstimator):
    """Unbiased gradient of `E[max of k]`, averaged over all subsets of the group (Walder and Karkhanis 2025, PKPO).

    - `baseline="loo_minus_one"`: `m/C(m,k) * sum_{I: i in I} (max R_I - max R_{I without i})`, what rollout i adds to
      its subsets. Never negative for k >= 2. `k = 1` is RLOO; `k = m` gives the best rollout m times its lead over the
      second, and nothing to the others. A constant group gets zeros.
    - `baseline="none"`: `m/C(m,k) * sum_{I: i in I} max R_I`; a constant group gets k times that constant.

    With `scale="group_std"` these weights w become `(w - mean(w)) / std(w)`, sample standard deviation over the group
    (Bagirov et al. 2025, arXiv 2510.23393), zeros if all are equal: as large as GRPO's advantages whatever k and the
    scale of the rewards, but biased, and without an off-policy form. At k = m only who is best is left, not by how
    much: take k near m/2.

    Args:
        k: Subset size, 1 <= k <= group size; None = the whole group (of valid rollouts).
        baseline: Variance reduction; both are unbiased.
        scale: `none`, or `group_std`, which without a baseline needs a k: all weights would be equal.
    """

    objective = "E[max of k]"

    def __init__(
        self,
        *,
        k: int | None = None,
        baseline: Literal["loo_minus_one", "none"] = "loo_minus_one",
        scale: Literal["none", "group_std"] = "none",
    ) -> None:
        self.k = None if k is None else check_integer("k", k, 1)
        self.baseline = check_choice("baseline", baseline, ("loo_minus_one", "none"))
        self.scale = check_choice("scale", scale, ("none", "group_std"))
        if scale == "group_std" and baseline == "none" and k is None:
            raise UserError(
                "k must be an integer below group_size with scale=group_std and baseline=none, got None: where the "
                "whole group is the only subset, all rollouts have the same weight."
            )

    @property
    def min_group_size(self) -> int:
        """k, and 2 at least where rollouts are compared; k + 1 where only subsets without a rollout tell it apart."""
        if self.scale == "group_std" and self.baseline == "none" and self.k is not None:
            return self.k + 1
        return max(self.k or 1, 1 if self.baseline == "none" else 2)

    @property
    def has_off_policy_form(self) -> bool:
        """Only the unbiased weights have one."""
        return self.scale == "none"

    @property
    def group_size_advice(self) -> str:
        return f"raise group_size to {self.min_group_size} or more, or lower k (now {self.k})."

    def compute(self, rewards: Tensor) -> Tensor:
        k = self.k or rewards.shape[1]
        if self.baseline == "loo_minus_one":
            weights = max_at_k.max_at_k_loo_weights(rewards, k)
        elif self.scale == "none":
            weights = max_at_k.max_at_k_weights(rewards, k)
        else:
            weights = max_at_k.max_at_k_gains(rewards, k)  # the same up to the mean, without its rounding
        return weights if self.scale == "none" else ratio_or_zero(centred(weights), sample_std(weights))

    def compute_off_policy(self, rewards: Tensor, ratios: Tensor) -> Tensor:
        """Exact weights; ratios are capped at e^(600/k), so that products of k of them stay finite."""
        if not self.has_off_policy_form:
            raise UserError(f"{self.name} has no off-policy form with scale={self.scale}; set scale=none.")
        k = self.k or rewards.shape[1]
        loo = self.baseline == "loo_minus_one"
        weights = max_at_k.off_policy_max_at_k_loo_weights if loo else max_at_k.off_policy_max_at_k_weights
        return weights(rewards, ratios.clamp(max=math.exp(600 / k)), k)
