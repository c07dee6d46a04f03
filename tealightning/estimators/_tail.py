"""Base classes of the estimators of the upper tail: `target_n`, `alpha`, `tail`, and the smallest group."""

import warnings
from typing import ClassVar

from torch import Tensor

from tealightning.checks import check_choice, check_integer, check_share
from tealightning.estimators.base import AdvantageEstimator
from tealightning.functional.tail import TAIL_MODELS, TailModel, smallest_group, tail_size, tail_weights


class TailEstimator(AdvantageEstimator):
    """Base of estimators that look at the top `k = ceil(alpha * m)` rollouts of a group, at least `min_tail`.

    Args:
        target_n: N, the best-of-N budget at deployment.
        alpha: Upper-tail level in (0, 1].
    """

    objective: ClassVar[str] = "E[max of N]"

    def __init__(self, *, target_n: int = 128, alpha: float = 0.25) -> None:
        self.target_n = check_integer("target_n", target_n, 1)
        self.alpha = check_share("alpha", alpha)
        self._warned = False

    @property
    def min_tail(self) -> int:
        """Fewest rollouts in the tail that carry a signal."""
        return 2

    @property
    def min_group_size(self) -> int:
        """The smallest m with `ceil(alpha * m) >= min_tail`."""
        return smallest_group(self.alpha, self.min_tail)

    @property
    def group_size_advice(self) -> str:
        or_alpha = ", or raise alpha" if self.alpha < 1 else ""
        return (
            f"the tail would have fewer than {self.min_tail} rollouts at alpha={self.alpha}; "
            f"raise group_size to {self.min_group_size} or more{or_alpha}."
        )

    def check_group_size(self, group_size: int) -> None:
        """A ValueError if the tail is too small, and one warning if it is so small that the spread is invisible."""
        super().check_group_size(group_size)
        if tail_size(self.alpha, group_size) == 2 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: with group_size={group_size} and alpha={self.alpha} the tail has 2 rollouts, from which "
                f"its spread cannot be followed (the quadratic term vanishes). Use group_size="
                f"{smallest_group(self.alpha, 3)} or more, or a larger alpha.",
                UserWarning,
                stacklevel=3,
            )


class PlugInEstimator(TailEstimator):
    """Base of estimators that plug the group's own tail into the gradient of a tail model's best-of-N.

    Args:
        tail: Model of the tail: `gaussian`; `gpd`, generalised Pareto with a shape from the group's own tail;
            `empirical`, no extrapolation.
    """

    def __init__(self, *, target_n: int = 128, alpha: float = 0.25, tail: TailModel = "gaussian") -> None:
        super().__init__(target_n=target_n, alpha=alpha)
        self.tail = check_choice("tail", tail, TAIL_MODELS)

    def plug_in(self, rewards: Tensor) -> Tensor:
        """Plug-in weights of groups of any size, [P, m] -> [P, m] float64."""
        return tail_weights(rewards, target_n=self.target_n, alpha=self.alpha, tail=self.tail)
