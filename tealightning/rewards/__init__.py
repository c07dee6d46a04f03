"""Rewards: score completions with models, functions and servers."""

from typing import Any

from tealightning.registry import register
from tealightning.rewards.base import REWARDS, Reward
from tealightning.rewards.classifier import SequenceClassifierReward
from tealightning.rewards.function import FunctionReward
from tealightning.rewards.http import HTTPReward
from tealightning.rewards.weighted import WeightedReward
from tealightning.types import RewardScores

__all__ = [
    "FunctionReward",
    "HTTPReward",
    "Reward",
    "RewardScores",
    "SequenceClassifierReward",
    "WeightedReward",
    "build_reward",
    "register",
    "reward_names",
]


def build_reward(name: str, **kwargs: Any) -> Reward:
    """The reward called `name` (its class name, or that in snake_case), built with `kwargs`.

    Raises:
        ValueError: for an unknown name or parameter, with the valid ones.
    """
    return REWARDS.build(name, **kwargs)


def reward_names() -> list[str]:
    """The names that `build_reward` knows, sorted."""
    return REWARDS.names()
