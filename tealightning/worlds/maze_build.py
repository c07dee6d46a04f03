"""Build a world of mazes: layouts, noisy walks through them, and a policy that has learned from the walks."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.errors import UserError
from tealightning.worlds.folder import (
    PROMPT_SPLITS,
    WORLDS,
    Playground,
    best_of_n_curve,
    build_folder,
    stream_seed,
    write_prompts,
)
from tealightning.worlds.maze import (
    FREE,
    GOAL,
    MAZE_WORLDS,
    MOVES,
    START,
    UNREACHABLE,
    WALL,
    MazeConfig,
    MazeReward,
    Mazes,
    goal_distances,
    grid_texts,
    maze_config,
    path_lengths,
)
from tealightning.worlds.policy import (
    EOS,
    PAD,
    Descent,
    fast_tokenizer,
    llama_config,
    new_policy,
    sample_completions,
    tokenize,
)

_STEPS = np.array(list(MOVES.values()))  # [4, 2]
_OPPOSITE = np.array([1, 0, 3, 2])  # of U, D, L, R
END = len(MOVES)
"""The choice to end a walk, after the four moves."""

FORMAT_VERSION = 1
"""Raised with every change of the recipe."""


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
    return Mazes(**{f.name: np.concatenate([getattr(m, f.name) for m in found.values()]) for f in fields(Mazes)})


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


def build_maze(
    out: Path | str,
    *,
    world: str | MazeConfig = "maze",
    seed: int = 0,
    size: str = "default",
    progress: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Playground:
    """Build `out` (policy/, prompts/{train,val,test}.jsonl, playground.json), or reuse it; see `build_prose`.

    The reward is `tealightning.worlds.MazeReward`. The layouts of the three splits and those that the policy has
    learned to walk in are all different.

    Args:
        world: A name in `MAZE_WORLDS`, or a configuration of your own.
        size: A name in `MAZE_SIZES`; of no effect beside a configuration.
        options: Settings of `MazeConfig` that replace those of a named world.
        out, seed, progress, overwrite: As in `build_prose`.

    Raises:
        ValueError: if `out` is something else than the world asked for, or a name is unknown.
    """
    config = world if isinstance(world, MazeConfig) else maze_config(world, size, **options)
    return build_folder(
        out,
        {"format_version": FORMAT_VERSION, "kind": "maze", "seed": seed, "config": asdict(config)},
        lambda folder: _fill(folder, config, seed=seed, progress=progress),
        num_threads=config.num_threads,
        progress=progress,
        overwrite=overwrite,
    )


WORLDS.update({name: partial(build_maze, world=name) for name in MAZE_WORLDS})


def character_tokenizer(config: MazeConfig) -> PreTrainedTokenizerFast:
    """One token a character: cells, moves, end of line and colon, and two special tokens."""
    symbols = [EOS, PAD, "\n", ":", WALL, FREE, START, GOAL, *MOVES]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast_tokenizer(tokenizer, config.max_positions)


def train_walker(
    mazes: Mazes, tokenizer: PreTrainedTokenizerFast, config: MazeConfig, *, seed: int, progress: bool
) -> LlamaForCausalLM:
    """A policy that walks as `noisy_walks` do: it learns their exact probabilities of every next move.

    A step takes `batch_size` of the mazes [steps * batch_size] and `walks` walks through each.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    architecture = llama_config(tokenizer, config, layers=config.layers, max_positions=config.max_positions)
    model = new_policy(architecture)
    descent = Descent(model, steps=config.steps, adamw_lr=config.lr, muon_lr=config.muon_lr, float32=True)
    model.train()
    for step in track(range(config.steps), description="Policy", disable=not progress):
        batch = mazes[step * config.batch_size : (step + 1) * config.batch_size]
        walks = noisy_walks(batch[np.arange(len(batch)).repeat(config.walks)], config, rng=rng)
        descent.step(_walk_loss(model, tokenizer, [f"{grid}:" for grid in grid_texts(batch)], walks))
    return model.eval()


def measure_mazes(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, mazes: Mazes, config: MazeConfig, *, seed: int
) -> dict[str, Any]:
    """Figures of the policy's samples on held-out mazes: mean, share of paths that arrive or score 0, best-of-n."""
    torch.manual_seed(seed)
    grids = [grid for grid in grid_texts(mazes) for _ in range(config.curve_samples)]
    prompts = [f"{grid}:" for grid in grids]
    paths = sample_completions(policy, tokenizer, prompts, max_new_tokens=config.max_moves, batch_size=1024)
    scores = MazeReward().score(prompts, paths, [{"grid": grid} for grid in grids])
    rewards = torch.tensor(scores, dtype=torch.float64).view(len(mazes), -1)
    return {
        "mean_score": rewards.mean().item(),
        "arrived_share": (rewards >= 0.5).double().mean().item(),
        "zero_share": (rewards == 0).double().mean().item(),
        "best_of_n": best_of_n_curve(rewards),
    }


def _fill(folder: Path, config: MazeConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """Write policy and prompts; returns what the manifest says of them."""
    sizes = {
        "train": config.train_prompts,
        "val": config.val_prompts,
        "test": config.test_prompts,
        "policy": config.steps * config.batch_size,
    }
    rng = np.random.default_rng(stream_seed(seed, "layouts"))
    every = draw_mazes(config, count=sum(sizes.values()), rng=rng)
    ends = np.cumsum(list(sizes.values()))
    splits = {name: every[end - sizes[name] : end] for name, end in zip(sizes, ends, strict=True)}
    tokenizer = character_tokenizer(config)
    for split in PROMPT_SPLITS:
        write_prompts(folder, split, ({"prompt": f"{grid}:", "grid": grid} for grid in grid_texts(splits[split])))
    policy = train_walker(splits["policy"], tokenizer, config, seed=stream_seed(seed, "policy"), progress=progress)
    pictured = splits["val"][: config.curve_prompts]
    figures = measure_mazes(policy, tokenizer, pictured, config, seed=stream_seed(seed, "figures"))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return {
        "prompts": {split: len(splits[split]) for split in PROMPT_SPLITS},
        "policy_parameters": policy.num_parameters(),
        "figures": figures,
    }


def _walk_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], walks: Walks
) -> torch.Tensor:
    """Cross-entropy in nats to the probabilities of the walks' choices, the mean over choices.

    All walks through a maze share one row: its prompt stands there once, and each walk sees it and itself.

    Args:
        prompts: [Q].
        walks: [Q * K].
    """
    symbols = torch.tensor(tokenizer.convert_tokens_to_ids([*MOVES, tokenizer.eos_token]))
    prompt_ids = torch.tensor(tokenize(prompts, tokenizer))
    rows, width = prompt_ids.shape
    choices = torch.from_numpy(walks.choices).view(rows, -1, walks.choices.shape[1])
    targets = torch.from_numpy(walks.probabilities).float().view(*choices.shape, -1)
    is_move = choices != END
    length = int(is_move.sum((1, 2)).max())
    ids = torch.full((rows, length), tokenizer.pad_token_id)
    walk_of = torch.full((rows, length), -1)
    step_of = torch.zeros((rows, length), dtype=torch.long)
    wanted = torch.zeros((rows, length, len(symbols)))
    for row in range(rows):
        walk, step = is_move[row].nonzero(as_tuple=True)
        ids[row, : len(walk)] = symbols[choices[row, walk, step]]
        walk_of[row, : len(walk)], step_of[row, : len(walk)] = walk, step
        has_next = step + 1 < targets.shape[2]
        wanted[row, : len(walk)][has_next] = targets[row, walk[has_next], step[has_next] + 1]
    segments = torch.cat([torch.full((rows, width), -2), walk_of], dim=1)
    seen = (segments[:, None, :] == -2) | (segments[:, None, :] == segments[:, :, None])
    logits = model(
        input_ids=torch.cat([prompt_ids, ids], dim=1),
        attention_mask=(seen & torch.ones(width + length, width + length).tril().bool())[:, None],
        position_ids=torch.cat([torch.arange(width).expand(rows, -1), width + step_of], dim=1),
        use_cache=False,
    ).logits[:, width - 1 :]
    first = targets.shape[1] * targets[:, :1, 0]  # the same for all walks through a maze
    wanted = torch.cat([first, wanted], dim=1)
    log_probs = logits.log_softmax(-1)[..., symbols]
    return -(wanted * log_probs).sum() / wanted.sum()
