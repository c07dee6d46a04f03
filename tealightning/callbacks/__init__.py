"""Lightning callbacks: rollouts, checkpoints, health checks, deadlines, reports, records, budgets and export.

A file that adds its check to `HEALTH_CHECKS` is imported here.
"""

from tealightning.callbacks.budget import Budget as Budget
from tealightning.callbacks.evaluation_record import EvaluationRecord as EvaluationRecord
from tealightning.callbacks.health import HealthChecks as HealthChecks
from tealightning.callbacks.report import BestOfNReport as BestOfNReport
from tealightning.callbacks.report import ExportPolicy as ExportPolicy
from tealightning.callbacks.report import SampleTable as SampleTable
from tealightning.callbacks.rollout import RolloutCallback as RolloutCallback
from tealightning.reliability.checkpoint import ResumableCheckpoint as ResumableCheckpoint
from tealightning.reliability.deadlines import Deadlines as Deadlines
