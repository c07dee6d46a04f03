"""The best of k rollouts as objective, k up to the group size."""

import math
from typing import ClassVar, Literal

from torch import Tensor

from tealightning.estimators._checks import check_choice, check_integer
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.max_at_k import max_at_k_loo_weights, max_at_k_weights
from tealightning.functional.off_policy_max_at_k import off_policy_max_at_k_loo_weights, off_policy_max_at_k_weights
from tealightning.registry import register


@register
class MaxAtK(AdvantageEstimator):
    """Unbiased gradient of `E[max of k]`, averaged over all subsets of the group (Walder and Karkhanis 2025, PKPO).

    - `baseline="loo_minus_one"`: `m/C(m,k) * sum_{I: i in I} (max R_I - max R_{I without i})`, what rollout i adds to
      its subsets. Never negative for k >= 2. `k = 1` is RLOO; `k = m` gives the best rollout m times its lead over the
      second, and nothing to the others. A constant group gets zeros.
    - `baseline="none"`: `m/C(m,k) * sum_{I: i in I} max R_I`; a constant group gets k times that constant.

    Args:
        k: Subset size, 1 <= k <= group size; None = the whole group (of valid rollouts).
        baseline: Variance reduction; both are unbiased.
    """

    objective: ClassVar[str] = "E[max of k]"
    has_off_policy_form: ClassVar[bool] = True

    def __init__(self, *, k: int | None = None, baseline: Literal["loo_minus_one", "none"] = "loo_minus_one") -> None:
        self.k = None if k is None else check_integer("k", k, 1)
        self.baseline = check_choice("baseline", baseline, ("loo_minus_one", "none"))

    @property
    def min_group_size(self) -> int:
        """k, and 2 at least where rollouts are compared."""
        return max(self.k or 1, 1 if self.baseline == "none" else 2)

    @property
    def group_size_advice(self) -> str:
        """A subset cannot be larger than the group."""
        return f"raise group_size to {self.min_group_size} or more, or lower k (now {self.k})."

    def compute(self, rewards: Tensor) -> Tensor:
        """[P, m] -> [P, m]."""
        k = self.k or rewards.shape[1]
        weights = max_at_k_weights if self.baseline == "none" else max_at_k_loo_weights
        return weights(rewards, k)

    def compute_off_policy(self, rewards: Tensor, ratios: Tensor) -> Tensor:
        """[P, m], [P, m] -> [P, m]; exact (see `tealightning.functional.off_policy_max_at_k`).

        Ratios are capped at e^(600/k), so that products of k of them stay finite.
        """
        k = self.k or rewards.shape[1]
        weights = off_policy_max_at_k_weights if self.baseline == "none" else off_policy_max_at_k_loo_weights
        return weights(rewards, ratios.clamp(max=math.exp(600 / k)), k)
