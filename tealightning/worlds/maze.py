"""Text mazes with a verifier: sample N plans, check them, keep the best one.

A prompt is a grid, one character a token, a line a row, and a colon ("S.#\\n..#\\n#.G:"); the answer is a path of
moves, one letter each ("RDDR"). Stopping early is safe and pays a little, going all the way is risky and pays much: an
objective of the mean learns to stop, one of the best of N to arrive.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.errors import UserError
from tealightning.rewards.base import Reward
from tealightning.types import Prompt
from tealightning.worlds.folder import named_settings
from tealightning.worlds.policy import check_sizes, sample_completions

WALL, FREE, START, GOAL = "#", ".", "S", "G"
MOVES: dict[str, tuple[int, int]] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
"""Letter -> (rows, columns)."""

Cell = tuple[int, int]
"""Row and column."""


@dataclass(kw_only=True, slots=True, frozen=True)
class MazeConfig:
    """Everything that decides a world of mazes, together with the seed. The defaults are the world "maze"."""

    side: int = 5  # rows and columns of the grid
    wall_density: float = 0.3  # probability that a cell is a wall
    path_lengths: tuple[int, int] = (5, 9)  # fewest and most moves of the shortest path from start to goal
    greedy: float = 0.3  # share of the walks' moves that go towards the goal; others go any legal way but back
    illegal: float = 0.03  # probability of a move to go into a wall or off the grid, which ends the walk
    stop: float = 0.12  # probability of a walk to end before each of its moves
    max_moves: int = 16  # longest walk; completions get as many tokens
    hidden_size: int = 128  # width of the policy, a multiple of head_size
    intermediate_size: int = 256
    head_size: int = 32  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
    layers: int = 3
    steps: int = 300  # optimizer steps of the policy, on new walks each
    batch_size: int = 16  # mazes a step
    walks: int = 8  # through each of them
    lr: float = 5e-3  # see `train`
    muon_lr: float = 1e-2
    train_prompts: int = 4000  # mazes in prompts/train.jsonl
    val_prompts: int = 128
    test_prompts: int = 128
    curve_prompts: int = 16  # validation mazes behind the figures of the manifest
    curve_samples: int = 128  # of each of them
    num_threads: int = 1  # of torch; fixed, because sums depend on it in the last bit

    def __post_init__(self) -> None:
        shortest, longest = self.path_lengths
        if self.side < 2:
            raise UserError(f"side must be at least 2, got {self.side}.")
        if not 1 <= shortest <= longest <= self.max_moves:
            bounds = f"1 <= shortest <= longest <= max_moves={self.max_moves}"
            raise UserError(f"path_lengths must have {bounds}, got {shortest, longest}.")
        for name in ("wall_density", "greedy", "illegal", "stop"):
            if not 0 <= getattr(self, name) < 1 and not (name == "greedy" and self.greedy == 1):
                raise UserError(f"{name} must be a probability in [0, 1), got {getattr(self, name)}.")
        check_sizes(self)

    @property
    def max_positions(self) -> int:
        """Of the policy: cells, ends of lines and the colon, the moves, the end of text."""
        return self.side * (self.side + 1) + self.max_moves + 1


MAZE_WORLDS: dict[str, dict[str, Any]] = {
    "maze": {},
    "maze-frequent": dict(path_lengths=(2, 4), greedy=0.9, stop=0.02),
}
"""`maze`: a path to the goal is rare. `maze-frequent`: paths are short and the policy has learned from good walks."""

MAZE_SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": dict(
        side=4, path_lengths=(2, 5), max_moves=8, hidden_size=32, intermediate_size=64, layers=2, steps=100,
        batch_size=32, walks=2, train_prompts=64, val_prompts=8, test_prompts=8, curve_samples=32, curve_prompts=8,
    ),
}  # fmt: skip


def maze_config(world: str = "maze", size: str = "default", **options: Any) -> MazeConfig:
    """The configuration of a named world, some of its settings replaced by `options`."""
    named = named_settings("world of mazes", world, MAZE_WORLDS) | named_settings("size of mazes", size, MAZE_SIZES)
    return MazeConfig(**named | options)


@dataclass(kw_only=True, slots=True)
class MazeMap:
    """One maze, to follow paths through."""

    start: Cell
    distances: dict[Cell, int]  # of every cell that can be reached: moves to the goal

    @classmethod
    def read(cls, grid: str) -> "MazeMap":
        """The maze of a text: a rectangle of the four characters with one start and one goal that it leads to."""
        lines = grid.split("\n")
        cells = {(row, column): symbol for row, line in enumerate(lines) for column, symbol in enumerate(line)}
        starts, goals = ([cell for cell, symbol in cells.items() if symbol == wanted] for wanted in (START, GOAL))
        is_rectangle = len({len(line) for line in lines}) == 1
        if not (is_rectangle and len(starts) == len(goals) == 1 and set(cells.values()) <= {WALL, FREE, START, GOAL}):
            raise UserError(
                f"A maze's grid must be lines of equal length made of {WALL!r}, {FREE!r}, one {START!r} and one "
                f"{GOAL!r}, got {grid!r}."
            )
        distances, reached = {goals[0]: 0}, goals  # breadth-first search
        for row, column in reached:
            for down, right in MOVES.values():
                cell = (row + down, column + right)
                if cells.get(cell, WALL) != WALL and cell not in distances:
                    distances[cell] = distances[row, column] + 1
                    reached.append(cell)
        if starts[0] not in distances:
            raise UserError(f"The maze's start does not lead to its goal: {grid!r}.")
        return cls(start=starts[0], distances=distances)

    def follow(self, path: str) -> tuple[list[Cell], bool]:
        """The cells that a path visits, start included, and whether all of its moves are legal; it ends at the first
        that is not: into a wall, off the grid, on from the goal, or no move at all."""
        cells = [self.start]
        for letter in path:
            row, column = cells[-1]
            down, right = MOVES.get(letter, (0, 0))
            cell = (row + down, column + right)
            if cell == cells[-1] or self.distances[cells[-1]] == 0 or cell not in self.distances:
                return cells, False
            cells.append(cell)
        return cells, True

    def score(self, path: str) -> float:
        """See `MazeReward`."""
        cells, is_legal = self.follow(path)
        if not is_legal:
            return 0.0
        initial, remaining = self.distances[self.start], self.distances[cells[-1]]
        if remaining == 0:
            return 0.5 + 0.5 * initial / len(path)
        return 0.4 * max(0, initial - remaining) / initial


class MazeReward(Reward):
    """A verifier of paths through a text maze.

    With `d0` the moves of the shortest path from start to goal, `d` those from the cell where a path of L moves ends:

    - a move into a wall or off the grid, a character that is no move, walking on from the goal: 0
    - a path that ends on the goal: `0.5 + 0.5 d0 / L`, so 1 for a shortest one
    - a path that ends elsewhere: `0.4 max(0, d0 - d) / d0`, the safe way out

    White space around a path does not count. A completion that was cut at the token limit ends where it was cut.
    The grid is read from each prompt's metadata, `{"grid": "..#S\\n..."}`.
    """

    def __init__(self) -> None:
        self._maps: dict[str, MazeMap] = {}

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> list[float]:
        """[B] scores in [0, 1].

        Raises:
            ValueError: for a prompt without a grid, or with one that is no maze.
        """
        scores = []
        for completion, columns in zip(completions, metadata, strict=True):
            grid = columns.get("grid")
            if not isinstance(grid, str):
                raise UserError(
                    f"MazeReward needs a column `grid` beside each prompt, got the columns {sorted(columns)}."
                )
            if grid not in self._maps:
                self._maps[grid] = MazeMap.read(grid)
            scores.append(self._maps[grid].score(completion.strip()))
        return scores


def reaches_goal(
    *, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """[B]: 1 for a path that ends on the goal, else 0. To be measured beside the reward."""
    return [float(score >= 0.5) for score in MazeReward().score(prompts, completions, metadata)]


def best_paths(policy: Path, grids: Sequence[str], *, samples: int, max_moves: int) -> list[str]:
    """Best of N sampled paths of the policy in a folder through each maze, at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = [f"{grid}:" for grid in grids for _ in range(samples)]
    with isolate_rng():
        torch.manual_seed(0)
        paths = sample_completions(model, tokenizer, prompts, max_new_tokens=max_moves, batch_size=1024)
    return [max(paths[i * samples : (i + 1) * samples], key=MazeMap.read(grid).score) for i, grid in enumerate(grids)]


def maze_picture(grids: Sequence[str], columns: dict[str, list[str]]) -> bytes:
    """Draw a row for each policy, a column for each maze: the grid, the path, its score; returns a PNG.

    `columns`: name of a policy -> its best path through each of the grids.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.75 * len(grids) + 0.9, 2.0 * len(columns) + 0.2), layout="constrained")
    axes = figure.subplots(len(columns), len(grids), squeeze=False)
    for row, (name, paths) in zip(axes, columns.items(), strict=True):
        for axis, grid, path in zip(row, grids, paths, strict=True):
            _draw(axis, grid, path)
        row[0].set_ylabel(name, fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()


def _draw(axis: Any, grid: str, path: str) -> None:
    from matplotlib.patches import Rectangle

    lines, maze = grid.split("\n"), MazeMap.read(grid)
    for row, line in enumerate(lines):
        for column, symbol in enumerate(line):
            ground = "#3b4252" if symbol == WALL else "#eceff4"
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=ground, edgecolor="white"))
            if symbol in (START, GOAL):
                color = "#5e81ac" if symbol == START else "#a3be8c"
                axis.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, facecolor=color))
                axis.text(column, row, symbol, ha="center", va="center", color="white", weight="bold", zorder=3)
    (cells, is_legal), score = maze.follow(path), maze.score(path)
    color = "#2e7d32" if score >= 0.5 else "#c62828"
    axis.plot([c for _, c in cells], [r for r, _ in cells], color=color, linewidth=3, solid_capstyle="round", zorder=2)
    axis.plot(cells[-1][1], cells[-1][0], marker="o" if is_legal else "x", color=color, markersize=7, zorder=4)
    axis.set(xlim=(-0.5, len(lines[0]) - 0.5), ylim=(len(lines) - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"{score:.2f}", fontsize=10, color=color)
    axis.spines[:].set_visible(False)
