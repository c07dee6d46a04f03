"""Embedded worlds, built without a download: prose of the Python installation, and worlds of styles."""

from tealightning.worlds.folder import Playground, load_playground
from tealightning.worlds.prose import build_prose
from tealightning.worlds.prose_config import PRESETS, ProseConfig
from tealightning.worlds.styles import STYLE_WORLDS, StylesConfig
from tealightning.worlds.styles_build import build_styles

__all__ = [
    "PRESETS",
    "STYLE_WORLDS",
    "Playground",
    "ProseConfig",
    "StylesConfig",
    "build_prose",
    "build_styles",
    "load_playground",
]
