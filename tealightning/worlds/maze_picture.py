"""Draw mazes with the best of N sampled paths of several policies."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.worlds.maze import FREE, GOAL, START, WALL, MazeMap
from tealightning.worlds.policy import sample_completions

_COLORS = {WALL: "#3b4252", FREE: "#eceff4", START: "#eceff4", GOAL: "#eceff4"}


@dataclass(kw_only=True, slots=True)
class BestPath:
    """The best of N sampled paths through one maze."""

    path: str
    score: float


def best_paths(policy: Path, grids: Sequence[str], *, samples: int, max_moves: int, seed: int = 0) -> list[BestPath]:
    """Best of N sampled paths through each maze, at temperature 1.

    Args:
        policy: Folder in Hugging Face format.
        grids: [Q], as `grid_texts` writes them.
        samples: N.
        max_moves: Longest path, in moves.
        seed: Seed of the samples; the global random streams are left as they were.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = [f"{grid}:" for grid in grids for _ in range(samples)]
    with isolate_rng():
        torch.manual_seed(seed)
        sampled = sample_completions(model, tokenizer, prompts, max_new_tokens=max_moves, batch_size=1024)
    chosen = []
    for i, grid in enumerate(grids):
        maze = MazeMap.read(grid)
        best = max(sampled[i * samples : (i + 1) * samples], key=maze.score)
        chosen.append(BestPath(path=best, score=maze.score(best)))
    return chosen


def maze_picture(grids: Sequence[str], columns: dict[str, list[BestPath]]) -> bytes:
    """Draw a row for each policy, a column for each maze: the grid, the path, its score; returns a PNG.

    Args:
        grids: [Q].
        columns: Name of a policy -> its best path through each of the mazes [Q].
    """
    figure = Figure(figsize=(1.75 * len(grids) + 0.9, 2.0 * len(columns) + 0.2), layout="constrained")
    axes = figure.subplots(len(columns), len(grids), squeeze=False)
    for row, (name, paths) in zip(axes, columns.items(), strict=True):
        for axis, grid, best in zip(row, grids, paths, strict=True):
            _draw(axis, grid, best)
        row[0].set_ylabel(name, fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()


def _draw(axis, grid: str, best: BestPath) -> None:  # type: ignore[no-untyped-def]
    lines = grid.split("\n")
    for row, line in enumerate(lines):
        for column, symbol in enumerate(line):
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_COLORS[symbol], edgecolor="white"))
            if symbol in (START, GOAL):
                color = "#5e81ac" if symbol == START else "#a3be8c"
                axis.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, facecolor=color))
                axis.text(column, row, symbol, ha="center", va="center", color="white", weight="bold", zorder=3)
    cells, is_legal = MazeMap.read(grid).follow(best.path)
    arrived = best.score >= 0.5
    color = "#2e7d32" if arrived else "#c62828"
    axis.plot([c for _, c in cells], [r for r, _ in cells], color=color, linewidth=3, solid_capstyle="round", zorder=2)
    axis.plot(cells[-1][1], cells[-1][0], marker="o" if is_legal else "x", color=color, markersize=7, zorder=4)
    axis.set(xlim=(-0.5, len(lines[0]) - 0.5), ylim=(len(lines) - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"{best.score:.2f}", fontsize=10, color=color)
    for spine in axis.spines.values():
        spine.set_visible(False)
