"""Text mazes with a verifier: sample N plans, check them, keep the best one.

A prompt is a grid, one character a token, a line a row, and a colon; the answer is a path of moves, one letter each:

    .#S..#
    ...#..
    #..#.G
    ......
    .#.#..
    ..#...:LDRDDRRUR

Stopping early is safe and pays a little, going all the way is risky and pays much: an objective of the mean learns to
stop, one of the best of N to arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tealightning.errors import UserError
from tealightning.rewards.base import Reward
from tealightning.types import Prompt
from tealightning.worlds.folder import named_settings

WALL, FREE, START, GOAL = "#", ".", "S", "G"
MOVES: dict[str, tuple[int, int]] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
"""Letter -> (rows, columns)."""

UNREACHABLE = -1
Cell = tuple[int, int]
"""Row and column."""


@dataclass(kw_only=True, slots=True, frozen=True)
class MazeConfig:
    """Everything that decides a world of mazes, together with the seed. The defaults are the world "maze".

    Args:
        side: Rows and columns of the grid.
        wall_density: Probability that a cell is a wall.
        path_lengths: Fewest and most moves of the shortest path from start to goal.
        greedy: Probability of a move of the walks that the policy learns from to be one towards the goal; otherwise it
            is any legal move that does not turn back. The dial from "success is rare" to "success is frequent".
        illegal: Probability of a move of the walks to go into a wall or off the grid, which ends the walk.
        stop: Probability of a walk to end before each of its moves.
        max_moves: Longest walk; completions get as many tokens.
        hidden_size: Width of the policy, a multiple of `head_size`.
        intermediate_size: Width of its feed-forward layers.
        head_size: Width of one attention head; vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
        layers: Depth of the policy.
        steps: Optimizer steps of its training, on new walks each.
        batch_size: Mazes a step.
        walks: Walks through each of them.
        lr: Peak AdamW learning rate of its embeddings, head and norms (linear warm-up, cosine decay).
        muon_lr: Peak Muon learning rate of its layers' matrices.
        train_prompts: Mazes in `prompts/train.jsonl`.
        val_prompts: Mazes in `prompts/val.jsonl`.
        test_prompts: Mazes in `prompts/test.jsonl`.
        curve_prompts: Mazes of the validation prompts behind the figures of the manifest.
        curve_samples: Samples of each of them.
        num_threads: Torch threads of the build; fixed, because sums depend on it in the last bit.
    """

    side: int = 5
    wall_density: float = 0.3
    path_lengths: tuple[int, int] = (5, 9)
    greedy: float = 0.3
    illegal: float = 0.03
    stop: float = 0.12
    max_moves: int = 16
    hidden_size: int = 128
    intermediate_size: int = 256
    head_size: int = 32
    layers: int = 3
    steps: int = 300
    batch_size: int = 16
    walks: int = 8
    lr: float = 5e-3
    muon_lr: float = 1e-2
    train_prompts: int = 4000
    val_prompts: int = 128
    test_prompts: int = 128
    curve_prompts: int = 16
    curve_samples: int = 128
    num_threads: int = 1

    def __post_init__(self) -> None:
        shortest, longest = self.path_lengths
        if self.side < 2:
            raise UserError(f"side must be at least 2, got {self.side}.")
        if not 1 <= shortest <= longest <= self.max_moves:
            raise UserError(
                f"path_lengths must be (shortest, longest) with 1 <= shortest <= longest <= max_moves="
                f"{self.max_moves}, got {shortest, longest}."
            )
        for name in ("wall_density", "greedy", "illegal", "stop"):
            if not 0 <= getattr(self, name) < 1 and not (name == "greedy" and self.greedy == 1):
                raise UserError(f"{name} must be a probability in [0, 1), got {getattr(self, name)}.")
        if self.hidden_size % self.head_size:
            raise UserError(f"hidden_size must be a multiple of head_size={self.head_size}, got {self.hidden_size}.")

    @property
    def prompt_tokens(self) -> int:
        """Of every prompt: cells, ends of lines, the colon."""
        return self.side * (self.side + 1)

    @property
    def max_positions(self) -> int:
        """Of the policy."""
        return self.prompt_tokens + self.max_moves + 1


MAZE_WORLDS: dict[str, dict[str, Any]] = {
    "maze": {},
    "maze-frequent": dict(path_lengths=(2, 4), greedy=0.9, stop=0.02),
}
"""`maze`: a path to the goal is rare. `maze-frequent`: paths are short and the policy has learned from good walks."""

MAZE_SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": dict(
        side=4,
        path_lengths=(2, 5),
        max_moves=8,
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        steps=100,
        batch_size=32,
        walks=2,
        train_prompts=64,
        val_prompts=8,
        test_prompts=8,
        curve_samples=32,
        curve_prompts=8,
    ),
}


def maze_config(world: str = "maze", size: str = "default", **options: Any) -> MazeConfig:
    """The configuration of a named world, some of its settings replaced by `options`.

    Raises:
        ValueError: for an unknown name, with the valid ones, and for settings out of range.
    """
    named = named_settings("world of mazes", world, MAZE_WORLDS) | named_settings("size of mazes", size, MAZE_SIZES)
    return MazeConfig(**named | options)


@dataclass(kw_only=True, slots=True)
class Mazes:
    """Q mazes as arrays."""

    distances: NDArray[np.int64]  # [Q, side, side]: moves to the goal, UNREACHABLE for walls and closed-off cells
    walls: NDArray[np.bool_]  # [Q, side, side]
    starts: NDArray[np.int64]  # [Q, 2]: row, column
    goals: NDArray[np.int64]  # [Q, 2]

    def __len__(self) -> int:
        return len(self.walls)

    def __getitem__(self, rows: Any) -> "Mazes":
        return Mazes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def path_lengths(mazes: Mazes) -> NDArray[np.int64]:
    """Moves of the shortest path from start to goal [Q]; UNREACHABLE where there is none."""
    return mazes.distances[np.arange(len(mazes)), mazes.starts[:, 0], mazes.starts[:, 1]]


def goal_distances(walls: NDArray[np.bool_], goals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Breadth-first search in all mazes at once.

    Args:
        walls: [Q, side, side].
        goals: [Q, 2].

    Returns:
        [Q, side, side]: moves to the goal, UNREACHABLE for walls and closed-off cells.
    """
    distances = np.full(walls.shape, UNREACHABLE)
    front = np.zeros_like(walls)
    front[np.arange(len(walls)), goals[:, 0], goals[:, 1]] = True
    step = 0
    while front.any():
        distances[front] = step
        spread = np.zeros_like(front)
        spread[:, 1:] |= front[:, :-1]
        spread[:, :-1] |= front[:, 1:]
        spread[:, :, 1:] |= front[:, :, :-1]
        spread[:, :, :-1] |= front[:, :, 1:]
        front = spread & ~walls & (distances == UNREACHABLE)
        step += 1
    return distances


def grid_texts(mazes: Mazes) -> list[str]:
    """Each maze as text: a line a row, `#` walls, `.` free cells, `S` start, `G` goal."""
    texts = []
    for walls, start, goal in zip(mazes.walls, mazes.starts, mazes.goals, strict=True):
        cells = np.where(walls, WALL, FREE)
        cells[tuple(start)], cells[tuple(goal)] = START, GOAL
        texts.append("\n".join("".join(row) for row in cells))
    return texts


def read_grid(grid: str) -> Mazes:
    """The maze of one text; the inverse of `grid_texts`.

    Raises:
        ValueError: unless it is a rectangle of the four characters with one start and one goal that it leads to.
    """
    lines = grid.split("\n")
    is_rectangle = len({len(line) for line in lines}) == 1 and grid != ""
    cells = np.array([list(line) for line in lines]) if is_rectangle else np.empty((0, 0), str)
    found = {symbol: np.argwhere(cells == symbol) for symbol in (START, GOAL)}
    if not (len(found[START]) == len(found[GOAL]) == 1 and np.isin(cells, [WALL, FREE, START, GOAL]).all()):
        raise UserError(
            f"A maze's grid must be lines of equal length made of {WALL!r}, {FREE!r}, one {START!r} and one {GOAL!r}, "
            f"got {grid!r}."
        )
    walls = (cells == WALL)[None]
    mazes = Mazes(distances=goal_distances(walls, found[GOAL]), walls=walls, starts=found[START], goals=found[GOAL])
    if path_lengths(mazes)[0] < 1:
        raise UserError(f"The maze's start does not lead to its goal: {grid!r}.")
    return mazes


@dataclass(kw_only=True, slots=True)
class MazeMap:
    """One maze, to follow paths through."""

    start: Cell
    distances: dict[Cell, int]  # of every cell that can be reached: moves to the goal

    @classmethod
    def read(cls, grid: str) -> "MazeMap":
        """The maze of a text.

        Raises:
            ValueError: if it is no maze.
        """
        maze = read_grid(grid)
        distances = maze.distances[0]
        cells = np.argwhere(distances != UNREACHABLE).tolist()
        row, column = maze.starts[0].tolist()
        return cls(start=(row, column), distances={(r, c): int(distances[r, c]) for r, c in cells})

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
        return [
            self._map(data).score(completion.strip()) for completion, data in zip(completions, metadata, strict=True)
        ]

    def _map(self, metadata: dict[str, Any]) -> MazeMap:
        grid = metadata.get("grid")
        if not isinstance(grid, str):
            raise UserError(f"MazeReward needs a column `grid` beside each prompt, got the columns {sorted(metadata)}.")
        if grid not in self._maps:
            self._maps[grid] = MazeMap.read(grid)
        return self._maps[grid]


def reaches_goal(
    *, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """[B]: 1 for a path that ends on the goal, else 0. To be measured beside the reward."""
    scores = MazeReward().score(prompts, completions, metadata)
    return [float(score >= 0.5) for score in scores]
