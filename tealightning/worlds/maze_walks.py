"""Noisy walks through mazes: what the policy of the world `maze` is trained on."""

import numpy as np
from numpy.typing import NDArray

from tealightning.worlds.maze import MOVES, UNREACHABLE, Mazes
from tealightning.worlds.maze_config import MazeConfig

_STEPS = np.array(list(MOVES.values()))  # [4, 2]
_LETTERS = np.array(list(MOVES))
_OPPOSITE = np.array([1, 0, 3, 2])  # of U, D, L, R


def noisy_walks(mazes: Mazes, config: MazeConfig, *, rng: np.random.Generator) -> list[str]:
    """One walk through each maze [Q], all at once.

    Before each move a walk ends with probability `stop`, and where it stands on the goal or has made `max_moves`. A
    move is illegal with probability `illegal` (and then the last), else towards the goal with probability `greedy`,
    else any legal move that does not turn back. Ties are broken at random; in a dead end a walk turns back.
    """
    count = len(mazes)
    positions, last = mazes.starts.copy(), np.full(count, -1)
    letters = np.full((count, config.max_moves), "", dtype="<U1")
    active = np.ones(count, bool)
    for step in range(config.max_moves):
        here = _at(mazes.distances, positions)
        active &= (here != 0) & (rng.random(count) >= config.stop)
        if not active.any():
            break
        reached = _around(mazes.distances, positions)  # [Q, 4]
        legal = reached != UNREACHABLE
        forward = legal & (np.arange(4) != np.where(last < 0, -1, _OPPOSITE[last])[:, None])
        forward = np.where(forward.any(1, keepdims=True), forward, legal)
        closer = legal & (reached < here[:, None])
        wanted = np.where((rng.random(count) < config.greedy)[:, None], closer, forward)
        is_illegal = (rng.random(count) < config.illegal) & ~legal.all(1)
        move = _choose(np.where(is_illegal[:, None], ~legal, wanted), rng)
        letters[active, step] = _LETTERS[move[active]]
        active &= ~is_illegal
        positions = np.where(active[:, None], positions + _STEPS[move], positions)
        last = np.where(active, move, last)
    return ["".join(row) for row in letters]


def _at(values: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    return values[np.arange(len(values)), cells[:, 0], cells[:, 1]]


def _around(distances: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distances of the four neighbours [Q, 4]; off the grid is UNREACHABLE."""
    padded = np.pad(distances, ((0, 0), (1, 1), (1, 1)), constant_values=UNREACHABLE)
    return np.stack([_at(padded, cells + 1 + step) for step in _STEPS], axis=1)


def _choose(allowed: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """One of the allowed columns of each row, uniformly; any where none is."""
    return np.where(allowed, rng.random(allowed.shape), -1.0).argmax(1)
