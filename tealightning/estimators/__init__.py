"""Advantage estimators: `build_estimator("tea", target_n=128)(rewards) -> advantages`."""

from typing import Any

from tealightning.estimators.base import ESTIMATORS, AdvantageEstimator
from tealightning.estimators.bon_max_mean import BonMaxMean
from tealightning.estimators.calibrated_tea import CalibratedTEA
from tealightning.estimators.cat_bon import CatBon
from tealightning.estimators.chow_bon_rl import ChowBonRL
from tealightning.estimators.direct import Direct
from tealightning.estimators.entropic import Entropic
from tealightning.estimators.grpo import GRPO
from tealightning.estimators.grpo_lead import GRPOLead
from tealightning.estimators.infalign import Infalign
from tealightning.estimators.max_at_k import MaxAtK
from tealightning.estimators.max_rl import MaxRL
from tealightning.estimators.mean_reward import MeanReward
from tealightning.estimators.optimal_tea import OptimalTEA
from tealightning.estimators.pass_at_n import PassAtN
from tealightning.estimators.prefix_tea import PrefixTEA
from tealightning.estimators.rs_grpo import RsGRPO
from tealightning.estimators.tail_rl import TailRL
from tealightning.estimators.tea import TEA
from tealightning.registry import register

__all__ = [
    "GRPO",
    "TEA",
    "AdvantageEstimator",
    "BonMaxMean",
    "CalibratedTEA",
    "CatBon",
    "ChowBonRL",
    "Direct",
    "Entropic",
    "GRPOLead",
    "Infalign",
    "MaxAtK",
    "MaxRL",
    "MeanReward",
    "OptimalTEA",
    "PassAtN",
    "PrefixTEA",
    "RsGRPO",
    "TailRL",
    "build_estimator",
    "estimator_names",
    "register",
]


def build_estimator(name: str, **kwargs: Any) -> AdvantageEstimator:
    """The estimator called `name` with its constructor's keyword arguments.

    Raises:
        ValueError: for an unknown name or parameter (naming the valid ones), or a parameter out of range.
    """
    return ESTIMATORS.build(name, **kwargs)


def estimator_names() -> list[str]:
    """Names of all registered estimators, sorted."""
    return ESTIMATORS.names()
