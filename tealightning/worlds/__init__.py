"""Embedded worlds, built without a download: text mazes, prose of the Python installation, and worlds of styles.

A world's file adds its names to `WORLDS`; its import here makes the command line offer them.
"""

from tealightning.worlds.folder import WORLDS as WORLDS
from tealightning.worlds.folder import Playground as Playground
from tealightning.worlds.folder import load_playground as load_playground
from tealightning.worlds.maze import MAZE_WORLDS as MAZE_WORLDS
from tealightning.worlds.maze import MazeConfig as MazeConfig
from tealightning.worlds.maze import MazeReward as MazeReward
from tealightning.worlds.maze_build import build_maze as build_maze
from tealightning.worlds.prose import ProseConfig as ProseConfig
from tealightning.worlds.prose_build import build_prose as build_prose
from tealightning.worlds.styles import STYLE_WORLDS as STYLE_WORLDS
from tealightning.worlds.styles import StylesConfig as StylesConfig
from tealightning.worlds.styles import build_styles as build_styles
