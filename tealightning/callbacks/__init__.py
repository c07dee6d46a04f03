"""Lightning callbacks: rollouts, checkpoints, health checks, deadlines, reports, records, budgets and export."""

from tealightning.callbacks.budget import Budget
from tealightning.callbacks.evaluation_record import EvaluationRecord
from tealightning.callbacks.export import ExportPolicy
from tealightning.callbacks.health import HealthChecks
from tealightning.callbacks.report import BestOfNReport, SampleTable
from tealightning.callbacks.rollout import RolloutCallback
from tealightning.reliability.checkpoint import ResumableCheckpoint
from tealightning.reliability.deadlines import Deadlines

__all__ = [
    "BestOfNReport",
    "Budget",
    "Deadlines",
    "EvaluationRecord",
    "ExportPolicy",
    "HealthChecks",
    "ResumableCheckpoint",
    "RolloutCallback",
    "SampleTable",
]
