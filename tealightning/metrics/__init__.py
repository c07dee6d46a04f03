"""Torchmetrics: stateful shells over `tealightning.functional`."""

from tealightning.metrics.best_of_n import BestOfN
from tealightning.metrics.tail_fit import TailFit

__all__ = ["BestOfN", "TailFit"]
