"""Rollouts: engines that sample completions, and the collector that scores and pads them."""

from tealightning.registry import register
from tealightning.rollouts.base import ENGINES, EngineContext, RolloutEngine
from tealightning.rollouts.collector import RolloutCollector, rollout_metrics
from tealightning.rollouts.generation_request import prompt_seed
from tealightning.rollouts.transformers import TransformersEngine
from tealightning.rollouts.vllm import VLLMEngine
from tealightning.rollouts.vllm_server import VLLMServerEngine
from tealightning.training.policy_weights import policy_weights

__all__ = [
    "EngineContext",
    "RolloutCollector",
    "RolloutEngine",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "build_engine",
    "engine_names",
    "policy_weights",
    "prompt_seed",
    "register",
    "rollout_metrics",
]

build_engine = ENGINES.build
"""The engine of a name (its class name, or that in snake_case), built with keyword arguments."""

engine_names = ENGINES.names
"""The names that `build_engine` knows, sorted."""
