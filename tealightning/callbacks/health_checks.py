"""List the checks that `HealthChecks` makes, each with the setting of its limit."""

from tealightning.callbacks.health_check import HealthCheck
from tealightning.callbacks.health_of_engine import (
    Drift,
    Mismatch,
    StaleAhead,
    StaleWeights,
    UnknownTokens,
    WeightsVersion,
)
from tealightning.callbacks.health_of_learning import KL, Degenerate, Entropy, NonFinite, RewardPrecision

LIMITS: dict[str, tuple[type[HealthCheck], ...]] = {
    "max_nonfinite_steps": (NonFinite,),
    "max_version_lag": (WeightsVersion,),
    "max_log_prob_diff": (Mismatch, Drift),
    "max_log_prob_growth": (StaleWeights, StaleAhead),
    "max_unknown_tokens": (UnknownTokens,),
    "max_reward_ties": (RewardPrecision,),
    "max_degenerate_steps": (Degenerate,),
    "max_kl": (KL,),
    "min_entropy_share": (Entropy,),
}
"""Setting of `HealthChecks` -> the checks whose limit it is."""

CHECKS = tuple(kind.name for kinds in LIMITS.values() for kind in kinds)
"""Names of all checks."""
