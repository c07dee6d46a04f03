"""Mazes: the verifier against hand-checked paths, layouts against a search of their own, walks against their
probabilities, and a tiny build."""

import json
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.worlds import MazeConfig, MazeReward, Playground, build_maze, load_playground
from tealightning.worlds.maze import MAZE_WORLDS, MOVES, MazeMap, best_paths, maze_config, maze_picture
from tealightning.worlds.maze_build import END, character_tokenizer, draw_mazes, goal_distances, grid_texts, noisy_walks

GRID = "S.#\n..#\n#.G"  # the shortest path has 4 moves, two of which are RDDR


def shortest(grid: str) -> int:
    """Moves of the shortest path, as the verifier counts them."""
    maze = MazeMap.read(grid)
    return maze.distances[maze.start]


def score(path: str, grid: str = GRID) -> float:
    return MazeReward().score(["ignored"], [path], [{"grid": grid}])[0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("RDDR", 1.0),
        ("DRDR", 1.0),
        (" RDDR\n", 1.0),  # white space around it does not count
        ("RLRDDR", 0.5 + 0.5 * 4 / 6),  # two moves too many
        ("", 0.0),
        ("R", 0.4 * 1 / 4),
        ("RD", 0.4 * 2 / 4),
        ("RDD", 0.4 * 3 / 4),
        ("RL", 0.0),  # back at the start
        ("U", 0.0),  # off the grid
        ("RR", 0.0),  # a wall
        ("RDDRL", 0.0),  # walks on from the goal
        ("RDDRR", 0.0),
        ("RDXDR", 0.0),  # no move
        ("rddr", 0.0),
    ],
)
def test_reward_scores_paths_as_its_docstring_says(path: str, expected: float) -> None:
    assert score(path) == pytest.approx(expected, abs=1e-12)


def test_a_path_that_ends_farther_from_the_goal_than_the_start_scores_0_not_less() -> None:
    assert score("L", ".SG") == 0.0


@pytest.mark.parametrize(
    "grid", ["", "S.\nG", "SG#\n..", "S.\n..", "SS\n.G", "S.x\n..G", "S#\n#G"], ids=lambda g: repr(g)
)
def test_reward_refuses_a_grid_that_is_no_maze(grid: str) -> None:
    with pytest.raises(ValueError, match="maze"):
        score("R", grid)


def test_reward_without_a_grid_names_the_column() -> None:
    with pytest.raises(ValueError, match=r"column `grid`.*\['id'\]"):
        MazeReward().score(["p"], ["R"], [{"id": "a"}])


def distance_by_search(grid: str) -> int | None:
    """A plain breadth-first search, cell by cell."""
    lines = grid.split("\n")
    cells = {(r, c): symbol for r, line in enumerate(lines) for c, symbol in enumerate(line)}
    (start,) = [cell for cell, symbol in cells.items() if symbol == "S"]
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        (row, column), steps = queue.popleft()
        if cells[row, column] == "G":
            return steps
        for down, right in MOVES.values():
            cell = (row + down, column + right)
            if cells.get(cell, "#") != "#" and cell not in seen:
                seen.add(cell)
                queue.append((cell, steps + 1))
    return None


@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.0, 0.5), side=st.integers(2, 6))
def test_layouts_are_what_the_config_says(seed: int, density: float, side: int) -> None:
    config = MazeConfig(side=side, wall_density=density, path_lengths=(1, 4))
    mazes = draw_mazes(config, count=3, rng=np.random.default_rng(seed))
    grids = grid_texts(mazes)
    assert len(set(grids)) == 3
    for grid, length in zip(grids, goal_distances(mazes)[mazes == "S"], strict=True):
        assert distance_by_search(grid) == length == shortest(grid) and 1 <= length <= 4


def test_settings_that_leave_no_layouts_are_told() -> None:
    config = MazeConfig(side=2, path_lengths=(4, 4))
    with pytest.raises(ValueError, match="hardly any layout of side 2"):
        draw_mazes(config, count=5, rng=np.random.default_rng(0))


def test_walks_have_the_probabilities_that_they_give() -> None:
    config = MazeConfig(greedy=0.5, illegal=0.1, stop=0.2)
    maze = np.array([["#", ".", "#"], ["G", "S", "."], ["#", ".", "#"]])  # one move towards the goal, three others
    count = 40_000
    choices, probabilities = noisy_walks(maze[None].repeat(count, 0), config, rng=np.random.default_rng(0))
    assert np.allclose(probabilities.sum(2), 1)
    given_probabilities = probabilities[0, 0]
    # all four moves are legal here: with 0.5 the greedy one, else any of the four
    assert given_probabilities == pytest.approx([0.8 * 0.125, 0.8 * 0.125, 0.8 * 0.625, 0.8 * 0.125, 0.2])
    shares = np.bincount(choices[:, 0], minlength=END + 1) / count
    assert np.abs(shares - given_probabilities).max() < 0.01


def test_walks_end_on_the_goal_after_an_illegal_move_and_do_not_turn_back() -> None:
    config = MazeConfig(greedy=0.0, illegal=0.3, stop=0.0)
    mazes = draw_mazes(config, count=500, rng=np.random.default_rng(1))
    walks, _ = noisy_walks(mazes, config, rng=np.random.default_rng(2))
    letters = list(MOVES)
    opposite = {"U": "D", "D": "U", "L": "R", "R": "L"}
    illegal = 0
    for grid, choices in zip(grid_texts(mazes), walks, strict=True):
        path = "".join(letters[choice] for choice in choices if choice != END)
        assert (choices[len(path) :] == END).all()
        cells, is_legal = MazeMap.read(grid).follow(path)
        assert len(cells) >= len(path)  # at most the last move is illegal
        illegal += not is_legal
        distances = MazeMap.read(grid).distances
        for i in range(1, len(cells) - 1):
            row, column = cells[i]
            ways = sum((row + d, column + r) in distances for d, r in MOVES.values())
            assert path[i] != opposite[path[i - 1]] or ways == 1 or i == len(cells) - 1
    assert illegal > 100


def test_more_greed_brings_more_walks_to_the_goal() -> None:
    mazes = draw_mazes(MazeConfig(), count=2000, rng=np.random.default_rng(0))
    shares = []
    for greedy in (0.1, 0.5, 0.9):
        walks, _ = noisy_walks(mazes, MazeConfig(greedy=greedy), rng=np.random.default_rng(1))
        paths = ["".join("UDLR"[c] for c in row if c != END) for row in walks]
        scores = MazeReward().score(paths, paths, [{"grid": grid} for grid in grid_texts(mazes)])
        shares.append(np.mean(np.array(scores) >= 0.5))
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 1}, "side must be at least 2"),
        ({"path_lengths": (4, 3)}, "path_lengths"),
        ({"path_lengths": (4, 30)}, "max_moves"),
        ({"stop": 1.0}, "stop must be a probability"),
        ({"greedy": 1.1}, "greedy must be a probability"),
        ({"hidden_size": 48}, "multiple of head_size=32"),
    ],
)
def test_config_refuses_what_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MazeConfig(**change)  # type: ignore[arg-type]


def test_unknown_world_and_size_name_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"world of mazes 'mase'.*'maze'"):
        maze_config("mase")
    with pytest.raises(ValueError, match=r"size of mazes 'tny'.*'tiny'"):
        maze_config("maze", "tny")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return build_maze(tmp_path_factory.mktemp("maze") / "tiny", size="tiny", progress=False)


def test_build_writes_what_a_run_needs(world: Playground) -> None:
    policy = AutoModelForCausalLM.from_pretrained(world.policy)
    assert policy.config.head_dim == 32  # vLLM's CPU attention takes it
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    splits = {}
    for name, path in (("train", world.train_prompts), ("val", world.val_prompts), ("test", world.test_prompts)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        splits[name] = {row["grid"] for row in rows}
        assert len(splits[name]) == len(rows) == world.manifest["prompts"][name]
        for row in rows[:3]:
            ids = tokenizer(row["prompt"])["input_ids"]
            assert len(ids) == len(row["prompt"]) == 4 * 5
            assert tokenizer.decode(ids) == row["prompt"] == row["grid"] + ":"
            assert 2 <= shortest(row["grid"]) <= 5
    assert not (splits["train"] & splits["val"] or splits["train"] & splits["test"] or splits["val"] & splits["test"])
    assert world.reward_model is None


def test_build_teaches_the_policy_to_walk(world: Playground) -> None:
    figures = world.manifest["figures"]
    assert figures["zero_share"] < 0.9  # untrained weights, whose paths are letters at random, score 0 in 97%
    assert list(figures["best_of_n"].values()) == sorted(figures["best_of_n"].values())
    assert figures["best_of_n"]["16"] > 0.2


def test_build_same_seed_gives_the_same_policy_and_is_reused(world: Playground, tmp_path: Path) -> None:
    again = build_maze(tmp_path / "again", size="tiny", progress=False)
    assert not again.reused
    assert (again.policy / "model.safetensors").read_bytes() == (world.policy / "model.safetensors").read_bytes()
    assert again.train_prompts.read_bytes() == world.train_prompts.read_bytes()
    assert build_maze(world.path, size="tiny", progress=False).reused
    other = build_maze(tmp_path / "other", size="tiny", seed=1, progress=False)
    assert other.train_prompts.read_bytes() != world.train_prompts.read_bytes()


def test_build_refuses_another_world(world: Playground) -> None:
    with pytest.raises(ValueError, match=r"another config.*overwrite=True"):
        build_maze(world.path, world="maze-frequent", size="tiny", progress=False)


def test_playground_command_builds_mazes_by_default_with_settings_of_ones_own(tmp_path: Path) -> None:
    args = ("playground", "--size", "tiny", "--out", tmp_path / "world", "--greedy", 0.8, "--path-lengths", 2, 3)
    result = run(*args)
    assert result.status == 0, result.err
    assert "shards" not in result.out + result.err
    config = load_playground(tmp_path / "world").manifest["config"]
    assert (config["greedy"], config["path_lengths"]) == (0.8, [2, 3])
    assert "Reusing" in run(*args).out
    wrong = run("playground", "--world", "styles", "--out", tmp_path / "other", "--greedy", 0.8)
    assert wrong.status == 2 and "--greedy is a setting of mazes" in wrong.err
    assert "greedy must be a probability" in run("playground", "--out", tmp_path / "x", "--greedy", 2).err


def test_picture_shows_the_best_of_the_sampled_paths(world: Playground) -> None:
    grids = [json.loads(line)["grid"] for line in world.test_prompts.read_text().splitlines()[:3]]
    few = best_paths(world.policy, grids, samples=2, max_moves=8)
    many = best_paths(world.policy, grids, samples=64, max_moves=8)
    few_scores, many_scores = (
        [score(path, grid) for path, grid in zip(paths, grids, strict=True)] for paths in (few, many)
    )
    assert np.mean(many_scores) > np.mean(few_scores)
    assert best_paths(world.policy, grids, samples=2, max_moves=8) == few
    image = maze_picture(grids, {"start": few, "end": many})
    assert image.startswith(b"\x89PNG")
    if folder := os.environ.get("PICTURES"):  # to look at it
        (Path(folder) / "mazes.png").write_bytes(image)


def test_tokenizer_has_one_token_a_character() -> None:
    tokenizer = character_tokenizer(MazeConfig())
    text = GRID + ":UDLR"
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_named_worlds_are_configurations() -> None:
    for name in MAZE_WORLDS:
        assert maze_config(name).max_positions == 5 * 6 + 16 + 1
