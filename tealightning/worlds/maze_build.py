"""Build a world of mazes: layouts, noisy walks through them, and a policy that has learned from the walks."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaForCausalLM as Policy
from transformers import PreTrainedTokenizerFast as Tokenizer

from tealightning.errors import UserError
from tealightning.worlds import folder as worlds
from tealightning.worlds import policy as lm
from tealightning.worlds.maze import FREE, GOAL, MAZE_WORLDS, MOVES, START, WALL, MazeConfig, MazeReward, maze_config

UNREACHABLE = -1
_STEPS = np.array(list(MOVES.values()))  # [4, 2]
_OPPOSITE = np.array([1, 0, 3, 2])  # of U, D, L, R
END = len(MOVES)
"""The choice to end a walk, after the four moves."""

RECIPE = {"format_version": 1, "kind": "maze"}

Grids = NDArray[np.str_]
"""Q mazes [Q, side, side], a character a cell."""


def grid_texts(grids: Grids) -> list[str]:
    """Each maze as text: a line a row, `#` walls, `.` free cells, `S` start, `G` goal."""
    return ["\n".join("".join(row) for row in grid) for grid in grids]


def draw_mazes(config: MazeConfig, *, count: int, rng: np.random.Generator) -> Grids:
    """`count` different layouts: independent walls, start and goal uniform among cells that are far enough apart."""
    side, (shortest, longest) = config.side, config.path_lengths
    found: dict[bytes, Grids] = {}
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
        lengths = goal_distances(drawn)[drawn == START]
        for grid in drawn[(lengths >= shortest) & (lengths <= longest)]:
            found.setdefault(grid.tobytes(), grid)
            if len(found) == count:
                break
    return np.stack(list(found.values()))


def _draw(config: MazeConfig, count: int, rng: np.random.Generator) -> Grids:
    """Layouts as they come, start and goal wherever they fall (but never on one cell)."""
    side, every = config.side, np.arange(count)
    grids = np.where(rng.random((count, side, side)) < config.wall_density, WALL, FREE)
    start = rng.integers(side * side, size=count)
    goal = (start + rng.integers(1, side * side, size=count)) % (side * side)
    grids[every, start // side, start % side] = START
    grids[every, goal // side, goal % side] = GOAL
    return grids


def goal_distances(grids: Grids) -> NDArray[np.int64]:
    """Moves to the goal from every cell [Q, side, side], UNREACHABLE for walls and closed-off cells: a breadth-first
    search in all mazes at once."""
    distances = np.full(grids.shape, UNREACHABLE)
    front = grids == GOAL
    step = 0
    while front.any():
        distances[front] = step
        spread = np.zeros_like(front)
        spread[:, 1:] |= front[:, :-1]
        spread[:, :-1] |= front[:, 1:]
        spread[:, :, 1:] |= front[:, :, :-1]
        spread[:, :, :-1] |= front[:, :, 1:]
        front = spread & (grids != WALL) & (distances == UNREACHABLE)
        step += 1
    return distances


def noisy_walks(
    grids: Grids, config: MazeConfig, *, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One walk through each maze, all at once: choices [Q, max_moves] (indices into MOVES; END from the end of the walk
    on), and the probability of each choice given those before it [Q, max_moves, END + 1].

    Before each move a walk ends with probability `stop`, and for certain on the goal and after an illegal move. A move
    is illegal with probability `illegal`, else towards the goal with probability `greedy`, else any legal move that
    does not turn back; ties are even. In a dead end a walk turns back.
    """
    count, distances = len(grids), goal_distances(grids)
    positions, last = np.argwhere(grids == START)[:, 1:], np.full(count, -1)
    has_ended = np.zeros(count, bool)
    choices = np.full((count, config.max_moves), END)
    probabilities = np.zeros((count, config.max_moves, END + 1))
    padded = np.pad(distances, ((0, 0), (1, 1), (1, 1)), constant_values=UNREACHABLE)
    for step in range(config.max_moves):
        here = _at(distances, positions)
        has_ended |= here == 0
        around = np.stack([_at(padded, positions + 1 + move) for move in _STEPS], axis=1)  # of the neighbours [Q, 4]
        legal = around != UNREACHABLE
        forward = legal & (np.arange(END) != np.where(last < 0, -1, _OPPOSITE[last])[:, None])
        forward = np.where(forward.any(1, keepdims=True), forward, legal)
        towards = config.greedy * _evenly(legal & (around < here[:, None])) + (1 - config.greedy) * _evenly(forward)
        illegal = np.where(legal.all(1, keepdims=True), 0.0, config.illegal)
        stop = np.where(has_ended, 1.0, config.stop)[:, None]
        probabilities[:, step, :END] = (1 - stop) * (illegal * _evenly(~legal) + (1 - illegal) * towards)
        probabilities[:, step, END:] = stop
        choice = (probabilities[:, step].cumsum(1) < rng.random((count, 1))).sum(1).clip(max=END)
        choices[:, step] = choice
        moves = np.minimum(choice, END - 1)
        is_legal = (choice != END) & legal[np.arange(count), moves]
        has_ended |= ~is_legal
        positions = np.where(is_legal[:, None], positions + _STEPS[moves], positions)
        last = np.where(is_legal, moves, last)
    return choices, probabilities


def _evenly(allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Equal probabilities of the allowed columns; zeros where there is none."""
    return allowed / np.maximum(allowed.sum(1, keepdims=True), 1)


def _at(values: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """[Q] values of one cell of each maze."""
    return values[np.arange(len(values)), cells[:, 0], cells[:, 1]]


def build_maze(
    out: Path | str,
    *,
    world: str | MazeConfig = "maze",
    seed: int = 0,
    size: str = "default",
    progress: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> worlds.Playground:
    """Build `out` (policy/, prompts/{train,val,test}.jsonl, playground.json), or reuse it; see `build_prose`.

    The layouts of the three splits and those that the policy has learned to walk in are all different.

    Args:
        world: A name in `MAZE_WORLDS`, or a configuration of your own.
        size: A name in `MAZE_SIZES`; of no effect beside a configuration.
        options: Settings of `MazeConfig` that replace those of a named world.
    """
    config = world if isinstance(world, MazeConfig) else maze_config(world, size, **options)
    return worlds.build_folder(out, RECIPE, config, _fill, seed=seed, progress=progress, overwrite=overwrite)


worlds.WORLDS.update({name: partial(build_maze, world=name) for name in MAZE_WORLDS})


def _fill(folder: Path, config: MazeConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """Write policy and prompts; returns what the manifest says of them."""
    sizes = {
        "train": config.train_prompts,
        "val": config.val_prompts,
        "test": config.test_prompts,
        "policy": config.steps * config.batch_size,
    }
    seed_of = partial(worlds.stream_seed, seed)
    rng = np.random.default_rng(seed_of("layouts"))
    every = draw_mazes(config, count=sum(sizes.values()), rng=rng)
    ends = np.cumsum(list(sizes.values()))
    splits = {name: every[end - sizes[name] : end] for name, end in zip(sizes, ends, strict=True)}
    tokenizer = character_tokenizer(config)
    prompts = {}
    for split in worlds.PROMPT_SPLITS:
        rows = ({"prompt": f"{grid}:", "grid": grid} for grid in grid_texts(splits[split]))
        prompts[split] = worlds.write_prompts(folder, split, rows)
    policy = _train_walker(splits["policy"], tokenizer, config, seed=seed_of("policy"), progress=progress)
    pictured = splits["val"][: config.curve_prompts]
    figures = _measure(policy, tokenizer, pictured, config, seed=seed_of("figures"))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return {
        "prompts": prompts,
        "policy_parameters": policy.num_parameters(),
        "figures": figures,
    }


def character_tokenizer(config: MazeConfig) -> Tokenizer:
    """One token a character: cells, moves, end of line and colon, and two special tokens."""
    symbols = [lm.EOS, lm.PAD, "\n", ":", WALL, FREE, START, GOAL, *MOVES]
    tokenizer = RawTokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=lm.PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return lm.fast_tokenizer(tokenizer, config.max_positions)


def _train_walker(mazes: Grids, tokenizer: Tokenizer, config: MazeConfig, *, seed: int, progress: bool) -> Policy:
    """A policy that walks as `noisy_walks` do: it learns their exact probabilities of every next move.

    A step takes `batch_size` of the mazes [steps * batch_size] and `walks` walks through each.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    architecture = lm.llama_config(tokenizer, config, layers=config.layers, max_positions=config.max_positions)
    model = lm.new_policy(architecture)

    def loss(step: int) -> torch.Tensor:
        batch = mazes[step * config.batch_size : (step + 1) * config.batch_size]
        walks = noisy_walks(batch.repeat(config.walks, axis=0), config, rng=rng)
        return _walk_loss(model, tokenizer, [f"{grid}:" for grid in grid_texts(batch)], *walks)

    bar = "Policy" if progress else None
    lm.train(model, loss, steps=config.steps, adamw_lr=config.lr, muon_lr=config.muon_lr, float32=True, description=bar)
    return model


def _walk_loss(
    model: Policy, tokenizer: Tokenizer, prompts: list[str], walks: NDArray[np.int64], probabilities: NDArray[Any]
) -> torch.Tensor:
    """Cross-entropy in nats to the probabilities of the choices of K walks through each of Q mazes, the mean over
    choices. All walks through a maze share one row: its prompt stands there once, and each walk sees it and itself."""
    symbols = torch.tensor(tokenizer.convert_tokens_to_ids([*MOVES, tokenizer.eos_token]))
    prompt_ids = torch.tensor(lm.tokenize(prompts, tokenizer))
    rows, width = prompt_ids.shape
    choices = torch.from_numpy(walks).view(rows, -1, walks.shape[1])
    targets = torch.from_numpy(probabilities).float().view(*choices.shape, -1)
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


def _measure(policy: Policy, tokenizer: Tokenizer, mazes: Grids, config: MazeConfig, *, seed: int) -> dict[str, Any]:
    """Figures of the policy's samples on held-out mazes: mean, share of paths that arrive or score 0, best-of-n."""
    torch.manual_seed(seed)
    grids = [grid for grid in grid_texts(mazes) for _ in range(config.curve_samples)]
    prompts = [f"{grid}:" for grid in grids]
    paths = lm.sample_completions(policy, tokenizer, prompts, max_new_tokens=config.max_moves, batch_size=1024)
    scores = MazeReward().score(prompts, paths, [{"grid": grid} for grid in grids])
    rewards = torch.tensor(scores, dtype=torch.float64).view(len(mazes), -1)
    return {
        "mean_score": rewards.mean().item(),
        "arrived_share": (rewards >= 0.5).double().mean().item(),
        "zero_share": (rewards == 0).double().mean().item(),
        "best_of_n": worlds.best_of_n_curve(rewards),
    }
