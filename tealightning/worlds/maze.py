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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tealightning.errors import UserError
from tealightning.rewards.base import Reward
from tealightning.types import Prompt
from tealightning.worlds.maze_config import MazeConfig

WALL, FREE, START, GOAL = "#", ".", "S", "G"
MOVES: dict[str, tuple[int, int]] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
"""Letter -> (rows, columns)."""

UNREACHABLE = -1
Cell = tuple[int, int]
"""Row and column."""


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
        return Mazes(
            distances=self.distances[rows], walls=self.walls[rows], starts=self.starts[rows], goals=self.goals[rows]
        )


def draw_mazes(config: MazeConfig, *, count: int, rng: np.random.Generator) -> Mazes:
    """`count` different layouts: independent walls, start and goal uniform among cells that are far enough apart.

    Raises:
        ValueError: if the settings leave too few layouts, with what to change.
    """
    side, (shortest, longest) = config.side, config.path_lengths
    found: dict[bytes, Mazes] = {}
    tries = 0
    while len(found) < count:
        tries += 1
        if tries > 200 and len(found) < count * tries / 2000:
            raise UserError(
                f"hardly any layout of side {side} with wall_density {config.wall_density} has a shortest path of "
                f"{shortest} to {longest} moves ({len(found)} of {count} found): widen path_lengths, or change side or "
                "wall_density."
            )
        drawn = _draw(config, min(4096, 16 * count), rng)
        lengths = path_lengths(drawn)
        for row in np.flatnonzero((lengths >= shortest) & (lengths <= longest)):
            maze = drawn[row : row + 1]
            key = maze.walls.tobytes() + maze.starts.tobytes() + maze.goals.tobytes()
            found.setdefault(key, maze)
            if len(found) == count:
                break
    parts = list(found.values())
    return Mazes(
        distances=np.concatenate([p.distances for p in parts]),
        walls=np.concatenate([p.walls for p in parts]),
        starts=np.concatenate([p.starts for p in parts]),
        goals=np.concatenate([p.goals for p in parts]),
    )


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


def _draw(config: MazeConfig, count: int, rng: np.random.Generator) -> Mazes:
    """Layouts as they come, start and goal wherever they fall (but never on one cell)."""
    side = config.side
    walls = rng.random((count, side, side)) < config.wall_density
    start_cells = rng.integers(side * side, size=count)
    goal_cells = (start_cells + rng.integers(1, side * side, size=count)) % (side * side)
    starts, goals = (np.stack(np.divmod(cells, side), axis=1) for cells in (start_cells, goal_cells))
    for cells in (starts, goals):
        walls[np.arange(count), cells[:, 0], cells[:, 1]] = False
    return Mazes(distances=goal_distances(walls, goals), walls=walls, starts=starts, goals=goals)
