"""Torchmetrics shells over `tealightning.functional`."""

from tealightning.metrics.best_of_n import BestOfN

__all__ = ["BestOfN"]
