"""Noisy walks through mazes: what the policy of the world `maze` learns from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tealightning.worlds.maze import MOVES, UNREACHABLE, Mazes
from tealightning.worlds.maze_config import MazeConfig

_STEPS = np.array(list(MOVES.values()))  # [4, 2]
_OPPOSITE = np.array([1, 0, 3, 2])  # of U, D, L, R
END = len(MOVES)
"""The choice to end a walk, after the four moves."""


@dataclass(kw_only=True, slots=True)
class Walks:
    """One walk through each of Q mazes."""

    choices: NDArray[np.int64]  # [Q, max_moves]: index into MOVES; END from the end of the walk on
    probabilities: NDArray[np.float64]  # [Q, max_moves, END + 1]: of each choice, given those before it


def noisy_walks(mazes: Mazes, config: MazeConfig, *, rng: np.random.Generator) -> Walks:
    """One walk through each maze [Q], all at once.

    Before each move a walk ends with probability `stop`, and for certain on the goal and after an illegal move. A move
    is illegal with probability `illegal`, else towards the goal with probability `greedy`, else any legal move that
    does not turn back; ties are even. In a dead end a walk turns back.
    """
    count = len(mazes)
    positions, last = mazes.starts.copy(), np.full(count, -1)
    has_ended = np.zeros(count, bool)
    choices = np.full((count, config.max_moves), END)
    probabilities = np.zeros((count, config.max_moves, END + 1))
    for step in range(config.max_moves):
        here = _at(mazes.distances, positions)
        has_ended |= here == 0
        around = _around(mazes.distances, positions)
        probabilities[:, step] = _probabilities(here, around, last, has_ended, config)
        choice = (probabilities[:, step].cumsum(1) < rng.random((count, 1))).sum(1).clip(max=END)
        choices[:, step] = choice
        moves = np.minimum(choice, END - 1)
        is_legal = (choice != END) & (around[np.arange(count), moves] != UNREACHABLE)
        has_ended |= ~is_legal
        positions = np.where(is_legal[:, None], positions + _STEPS[moves], positions)
        last = np.where(is_legal, moves, last)
    return Walks(choices=choices, probabilities=probabilities)


def _probabilities(
    here: NDArray[np.int64],
    around: NDArray[np.int64],
    last: NDArray[np.int64],
    has_ended: NDArray[np.bool_],
    config: MazeConfig,
) -> NDArray[np.float64]:
    """[Q, END + 1] from distances to the goal here [Q] and in the neighbouring cells [Q, 4], and the last move [Q]."""
    legal = around != UNREACHABLE
    forward = legal & (np.arange(END) != np.where(last < 0, -1, _OPPOSITE[last])[:, None])
    forward = np.where(forward.any(1, keepdims=True), forward, legal)
    illegal = np.where(legal.all(1, keepdims=True), 0.0, config.illegal)
    towards = config.greedy * _evenly(legal & (around < here[:, None])) + (1 - config.greedy) * _evenly(forward)
    moves = illegal * _evenly(~legal) + (1 - illegal) * towards
    stop = np.where(has_ended, 1.0, config.stop)[:, None]
    return np.concatenate([(1 - stop) * moves, stop], axis=1)


def _evenly(allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Equal probabilities of the allowed columns; zeros where there is none."""
    return allowed / np.maximum(allowed.sum(1, keepdims=True), 1)


def _at(values: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    return values[np.arange(len(values)), cells[:, 0], cells[:, 1]]


def _around(distances: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distances of the four neighbours [Q, 4]; off the grid is UNREACHABLE."""
    padded = np.pad(distances, ((0, 0), (1, 1), (1, 1)), constant_values=UNREACHABLE)
    return np.stack([_at(padded, cells + 1 + step) for step in _STEPS], axis=1)
