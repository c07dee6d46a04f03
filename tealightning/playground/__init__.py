"""Embedded worlds, built without a download: prose of the Python installation, and worlds of styles."""

from tealightning.playground.build import build_playground
from tealightning.playground.config import PRESETS, PlaygroundConfig
from tealightning.playground.folder import Playground, load_playground
from tealightning.playground.styles import STYLE_WORLDS, StylesConfig
from tealightning.playground.styles_build import build_styles

__all__ = [
    "PRESETS",
    "STYLE_WORLDS",
    "Playground",
    "PlaygroundConfig",
    "StylesConfig",
    "build_playground",
    "build_styles",
    "load_playground",
]
