"""Embedded worlds, built without a download: text mazes, prose of the Python installation, and worlds of styles.

A world's file adds its names to `WORLDS`; its import here makes the command line offer them.
"""

from tealightning.worlds.folder import WORLDS, Playground, load_playground
from tealightning.worlds.maze import MAZE_WORLDS, MazeConfig, MazeReward
from tealightning.worlds.maze_build import build_maze
from tealightning.worlds.prose import ProseConfig
from tealightning.worlds.prose_build import build_prose
from tealightning.worlds.styles import StylesConfig, build_styles

__all__ = ["MAZE_WORLDS", "WORLDS", "MazeConfig", "MazeReward", "Playground", "ProseConfig", "StylesConfig"]
__all__ += ["build_maze", "build_prose", "build_styles", "load_playground"]
