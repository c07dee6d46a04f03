"""Rewards: score completions with models, functions and servers."""

from tealightning.registry import register
from tealightning.rewards.base import REWARDS, Reward, WeightedReward
from tealightning.rewards.classifier import SequenceClassifierReward
from tealightning.rewards.function import FunctionReward
from tealightning.rewards.http import HTTPReward
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

build_reward = REWARDS.build
"""The reward of a name (its class name, or that in snake_case), built with keyword arguments."""

reward_names = REWARDS.names
"""The names that `build_reward` knows, sorted."""
