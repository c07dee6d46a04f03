"""Lightning callbacks: rollouts, the best-of-n report, sample tables, export."""

from tealightning.callbacks.export import ExportPolicy
from tealightning.callbacks.report import BestOfNReport
from tealightning.callbacks.rollout import RolloutCallback
from tealightning.callbacks.samples import SampleTable

__all__ = ["BestOfNReport", "ExportPolicy", "RolloutCallback", "SampleTable"]
