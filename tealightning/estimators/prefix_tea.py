"""The plug-in gradient with its leading bias cancelled by prefixes of the group."""

from torch import Tensor

from tealightning.checks import check_integer
from tealightning.errors import UserError
from tealightning.estimators._tail import PlugInEstimator
from tealightning.functional.tail import TailModel, prefix_weights
from tealightning.registry import register


@register
class PrefixTEA(PlugInEstimator):
    """Jackknife over prefixes of the group, with `w` the weights of `Direct`:

        A_i = sum_j v_j (m/P_j) 1{i < P_j} w_i(first P_j rollouts)

    The prefixes `P_j = round(j m / num_prefixes)` have biases of known powers of `1/P_j`; the weights `v` of
    `functional.tail.jackknife_weights` cancel the first `order - 1` of them (arXiv 2605.10716). Depends on the order of
    the rollouts, which is arbitrary: averaging over cyclic shifts (`rotations`) has the same expectation and less
    variance. Prefixes whose tail has a single rollout contribute zeros. A constant group gets zeros.

    Args:
        num_prefixes: J, number of prefixes, the whole group included.
        order: q, 1 (no debiasing) to `num_prefixes`.
        rotations: Cyclic shifts of the group to average over.
    """

    def __init__(
        self,
        *,
        target_n: int = 128,
        alpha: float = 0.25,
        num_prefixes: int = 4,
        order: int = 2,
        rotations: int = 4,
        tail: TailModel = "gaussian",
    ) -> None:
        super().__init__(target_n=target_n, alpha=alpha, tail=tail)
        self.num_prefixes = check_integer("num_prefixes", num_prefixes, 1)
        self.order = check_integer("order", order, 1)
        self.rotations = check_integer("rotations", rotations, 1)
        if order > num_prefixes:
            raise UserError(f"order must be at most num_prefixes={num_prefixes}, got {order}.")

    @property
    def min_group_size(self) -> int:
        """Enough for a tail of 2 in the whole group, and for `num_prefixes` different prefixes."""
        return max(super().min_group_size, self.num_prefixes)

    @property
    def group_size_advice(self) -> str:
        return f"{super().group_size_advice[:-1]}; num_prefixes (now {self.num_prefixes}) may not exceed group_size."

    def compute(self, rewards: Tensor) -> Tensor:
        sizes = {"num_prefixes": self.num_prefixes, "order": self.order, "rotations": self.rotations}
        return prefix_weights(rewards, self.plug_in, **sizes)
