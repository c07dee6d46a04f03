"""The embedded default world: a policy, a reward model and prompts made from the Python installation alone."""

from tealightning.playground.build import Playground, build_playground, load_playground
from tealightning.playground.config import PRESETS, PlaygroundConfig

__all__ = ["PRESETS", "Playground", "PlaygroundConfig", "build_playground", "load_playground"]
