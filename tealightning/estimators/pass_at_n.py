"""The probability that at least one of N answers is right, for rewards that are 0 or 1."""

import warnings
from typing import Literal

from torch import Tensor

from tealightning.checks import check_choice, check_finite, check_integer, check_positive
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.binary import pass_at_n_weights
from tealightning.registry import register


@register
class PassAtN(AdvantageEstimator):
    """Gradient `N (1-p)^(N-1) grad p` of `1 - (1-p)^N`, p the probability of a reward above `threshold`, for any N.

    The factor is replaced by its expectation given the other rollouts, under `p ~ Beta(prior_successes,
    prior_failures)` before them (`functional.binary.pass_at_n_factors`): with f failures in the group, a success gets

        A = N * prod_{j=0}^{N-2} (prior_failures + f + j) / (prior_successes + prior_failures + m - 1 + j)

    - `baseline="none"`: failures get exactly 0. So does a group of successes only, although the formula leaves it a
      little: 3e-5 at m = 8, N = 16, but 0.1 at m = N = 4.
    - `baseline="loo"`: `R_i` minus the mean of the others' outcomes, times the factor that the others give. The same
      expectation (that omission aside); smaller advantages where successes are common.

    Derived here. The improper prior (0, 2 - N) gives max@k at k = N <= m (Walder and Karkhanis 2025, arXiv 2505.15201).
    A proper prior biases the estimate towards its own p, by less the larger m, and gives a signal for N > m. Groups
    without contrast get zeros.

    Args:
        target_n: N, the number of answers at deployment.
        prior_successes: First parameter of the Beta prior of p, > 0.
        prior_failures: Second, > 0.
        threshold: Rewards above it are successes.
        baseline: Baseline of the outcomes, `none` or `loo`.
    """

    objective = "P(success in N)"
    min_group_size = 2  # a single rollout is a group without contrast

    def __init__(
        self,
        *,
        target_n: int = 128,
        prior_successes: float = 1.0,
        prior_failures: float = 1.0,
        threshold: float = 0.5,
        baseline: Literal["none", "loo"] = "none",
    ) -> None:
        self.target_n = check_integer("target_n", target_n, 1)
        self.prior_successes = check_positive("prior_successes", prior_successes)
        self.prior_failures = check_positive("prior_failures", prior_failures)
        self.threshold = check_finite("threshold", threshold)
        self.baseline = check_choice("baseline", baseline, ("none", "loo"))
        self._warned = False

    def compute(self, rewards: Tensor) -> Tensor:
        if not self._warned and ((rewards != 0) & (rewards != 1)).any():
            self._warned = True
            warnings.warn(
                f"{self.name}: rewards hold values other than 0 and 1; all that counts is whether they exceed "
                f"threshold={self.threshold}. Use max_at_k or tea for graded rewards.",
                UserWarning,
                stacklevel=3,
            )
        outcomes = (rewards > self.threshold).double()
        prior = {"prior_successes": self.prior_successes, "prior_failures": self.prior_failures}
        weights = pass_at_n_weights(outcomes, self.target_n, baseline=self.baseline, **prior)
        return weights.masked_fill(outcomes.all(dim=1, keepdim=True), 0.0)
