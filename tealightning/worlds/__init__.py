"""Embedded worlds, built without a download: text mazes, prose of the Python installation, and worlds of styles."""

from tealightning.worlds.folder import Playground, load_playground
from tealightning.worlds.maze import MazeReward
from tealightning.worlds.maze_build import build_maze
from tealightning.worlds.maze_config import MAZE_WORLDS, MazeConfig
from tealightning.worlds.prose import build_prose
from tealightning.worlds.prose_config import PRESETS, ProseConfig
from tealightning.worlds.styles import STYLE_WORLDS, StylesConfig
from tealightning.worlds.styles_build import build_styles

__all__ = [
    "MAZE_WORLDS",
    "PRESETS",
    "STYLE_WORLDS",
    "MazeConfig",
    "MazeReward",
    "Playground",
    "ProseConfig",
    "StylesConfig",
    "build_maze",
    "build_prose",
    "build_styles",
    "load_playground",
]
