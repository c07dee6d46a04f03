"""The plug-in gradient of the tail surrogate of best-of-N."""

from torch import Tensor

from tealightning.estimators._tail import PlugInEstimator
from tealightning.registry import register


@register
class Direct(PlugInEstimator):
    """Gradient weights of `mu_a + ct_N * sigma_a` with the group's own tail plugged in (arXiv 2605.10716):

        A_i = (e_i/alpha) [1 + ct_N (e_i - 2 e_mean)/(2 sigma)]

    for the top `k = ceil(alpha m)` rollouts, where `e` is the excess over the k-th reward; exactly 0 for the others
    (and for the k-th). See `functional.tail`, also for the other tails. Biased by O(1/m). A tail without spread gets
    zeros.
    """

    def compute(self, rewards: Tensor) -> Tensor:
        return self.plug_in(rewards)
