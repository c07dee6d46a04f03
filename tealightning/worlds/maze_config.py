"""Sizes and training settings of the world `maze`, and its named variants."""

from dataclasses import dataclass
from typing import Any

from tealightning.errors import UserError
from tealightning.registry import did_you_mean


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
"""`maze`: a path to the goal is rare. `maze-frequent`: paths are short and the policy has learned
from good walks, so it arrives often."""

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
    for what, name, valid in (("world", world, MAZE_WORLDS), ("size", size, MAZE_SIZES)):
        if name not in valid:
            raise UserError(f"Unknown {what} of mazes {name!r}.{did_you_mean(name, valid)}")
    return MazeConfig(**MAZE_WORLDS[world] | MAZE_SIZES[size] | options)
