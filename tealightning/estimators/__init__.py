"""Advantage estimators: `build_estimator("tea", target_n=128)(rewards) -> advantages`.

Importing an estimator here makes it known by its name.
"""

from typing import Any

from tealightning.estimators.base import ESTIMATORS as ESTIMATORS
from tealightning.estimators.base import AdvantageEstimator as AdvantageEstimator
from tealightning.estimators.bon_max_mean import BonMaxMean as BonMaxMean
from tealightning.estimators.calibrated_tea import CalibratedTEA as CalibratedTEA
from tealightning.estimators.cat_bon import CatBon as CatBon
from tealightning.estimators.chow_bon_rl import ChowBonRL as ChowBonRL
from tealightning.estimators.direct import Direct as Direct
from tealightning.estimators.entropic import Entropic as Entropic
from tealightning.estimators.grpo import GRPO as GRPO
from tealightning.estimators.grpo_lead import GRPOLead as GRPOLead
from tealightning.estimators.infalign import Infalign as Infalign
from tealightning.estimators.max_at_k import MaxAtK as MaxAtK
from tealightning.estimators.max_rl import MaxRL as MaxRL
from tealightning.estimators.mean_reward import MeanReward as MeanReward
from tealightning.estimators.optimal_tea import OptimalTEA as OptimalTEA
from tealightning.estimators.pass_at_n import PassAtN as PassAtN
from tealightning.estimators.prefix_tea import PrefixTEA as PrefixTEA
from tealightning.estimators.rs_grpo import RsGRPO as RsGRPO
from tealightning.estimators.tail_rl import TailRL as TailRL
from tealightning.estimators.tea import TEA as TEA
from tealightning.registry import register as register


def build_estimator(name: str, **kwargs: Any) -> AdvantageEstimator:
    """The estimator called `name` with its constructor's keyword arguments; a ValueError if one of them is wrong."""
    return ESTIMATORS.build(name, **kwargs)


def estimator_names() -> list[str]:
    """Names of all registered estimators, sorted."""
    return ESTIMATORS.names()
