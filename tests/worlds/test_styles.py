"""Worlds of styles: the reward, the disagreement of mean and tail, and a tiny build."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import CONFIGS, resolved, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.estimators import build_estimator
from tealightning.rewards import FunctionReward
from tealightning.worlds import Playground, StylesConfig, build_prose, build_styles, load_playground
from tealightning.worlds.styles import (
    dish_reward,
    draw_prompts,
    draw_texts,
    is_daring,
    mixture_best_of_n,
    style_of,
    styles_config,
)

PROMPT = "supper for Ada with lemon and rye:"
STYLES, BUDGET = styles_config("styles"), styles_config("styles-budget")


def _rewards(config: StylesConfig, style: str, count: int) -> torch.Tensor:
    dishes = [f" {style} plum miso {i}" for i in range(count)]
    scores = dish_reward(prompts=[PROMPT] * count, completions=dishes, metadata=[config.reward_metadata] * count)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize(("style", "mean", "sd"), [("classic", 0.0, 1.0), ("daring", -1.0, 2.0)])
def test_dish_reward_is_normal_with_the_mean_and_sd_of_its_style(style: str, mean: float, sd: float) -> None:
    z = ((_rewards(STYLES, style, 4000) - mean) / sd).sort().values
    expected = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    assert (torch.special.ndtr(z) - torch.special.ndtr(expected)).abs().max() < 0.0258  # Kolmogorov-Smirnov at 1%


def test_dish_reward_depends_on_prompt_and_completion_and_on_nothing_else() -> None:
    def score(prompt: str, completion: str) -> float:
        return dish_reward(prompts=[prompt], completions=[completion], metadata=[STYLES.reward_metadata])[0]

    first = score(PROMPT, " daring plum miso kale")
    assert first == score(PROMPT, "daring plum miso kale ")
    assert first != score(PROMPT, " daring plum kale miso")
    assert first != score("supper for Ben with lemon and rye:", " daring plum miso kale")
    assert first == pytest.approx(-1.4347, abs=1e-4)  # the same on every machine


@pytest.mark.parametrize("completion", ["", " classic", " daring plum miso", " plum miso kale fig", ": daring a b c"])
def test_what_is_no_dish_gets_the_failure_reward(completion: str) -> None:
    batch = dict(prompts=[PROMPT], completions=[completion], metadata=[STYLES.reward_metadata])
    assert style_of(completion) is None
    assert dish_reward(**batch) == [-8.0]
    assert math.isnan(is_daring(**batch)[0])


def test_is_daring_tells_the_styles_apart() -> None:
    batch = dict(prompts=[PROMPT] * 2, completions=[" daring a b c", " classic a b c"], metadata=[{}, {}])
    assert is_daring(**batch) == [1.0, 0.0]


def test_mixture_best_of_n_of_one_style_is_the_normal_order_statistic() -> None:
    assert mixture_best_of_n(STYLES, 0.0, 1) == pytest.approx(0.0, abs=1e-9)
    assert mixture_best_of_n(STYLES, 0.0, 2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    assert mixture_best_of_n(STYLES, 1.0, 2) == pytest.approx(-1 + 2 / math.sqrt(math.pi), abs=1e-6)
    assert mixture_best_of_n(STYLES, 0.25, 1) == pytest.approx(-0.25, abs=1e-9)


def test_mean_and_tail_disagree_in_the_world_styles() -> None:
    start = STYLES.daring_share
    assert mixture_best_of_n(STYLES, 0, 1) > mixture_best_of_n(STYLES, start, 1)
    assert mixture_best_of_n(STYLES, 0, 128) < mixture_best_of_n(STYLES, start, 128) - 0.5
    assert mixture_best_of_n(STYLES, 1, 128) > mixture_best_of_n(STYLES, start, 128) + 0.9


def test_best_of_16_and_best_of_128_disagree_in_the_world_styles_budget() -> None:
    start = BUDGET.daring_share
    assert mixture_best_of_n(BUDGET, 0, 16) > mixture_best_of_n(BUDGET, start, 16) > mixture_best_of_n(BUDGET, 1, 16)
    assert mixture_best_of_n(BUDGET, 0, 128) < mixture_best_of_n(BUDGET, start, 128) - 0.25
    assert mixture_best_of_n(BUDGET, 1, 128) > mixture_best_of_n(BUDGET, start, 128) + 0.2


def _pull_to_daring(estimator: str, config: StylesConfig, **arguments: float) -> float:
    """Mean of A (1{daring} - p) at the starting policy over its standard error: 4,000 groups of 16."""
    generator = torch.Generator().manual_seed(0)
    daring = (torch.rand(4000, 16, generator=generator, dtype=torch.float64) < config.daring_share).double()
    z = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    mean = config.classic_mean + daring * (config.daring_mean - config.classic_mean)
    rewards = mean + z * (config.classic_sd + daring * (config.daring_sd - config.classic_sd))
    pull = (build_estimator(estimator, **arguments)(rewards) * (daring - config.daring_share)).mean(dim=1)
    return float(pull.mean() / (pull.std() / math.sqrt(len(pull))))


@pytest.mark.parametrize("name", ["direct", "tea", "prefix_tea", "calibrated_tea", "optimal_tea"])
def test_tail_family_is_drawn_to_daring_in_the_world_styles(name: str) -> None:
    assert _pull_to_daring(name, STYLES, target_n=128) > 10


@pytest.mark.parametrize("name", ["mean_reward", "grpo"])
@pytest.mark.parametrize("config", [STYLES, BUDGET], ids=["styles", "styles-budget"])
def test_mean_family_is_drawn_to_classic(name: str, config: StylesConfig) -> None:
    assert _pull_to_daring(name, config) < -10


@pytest.mark.parametrize(
    ("name", "sign"),
    [("max_at_k", -1), ("direct", -1), ("tea", -1), ("prefix_tea", -1), ("calibrated_tea", 1), ("optimal_tea", 1)],
)
def test_only_the_unbiased_are_drawn_to_daring_in_the_world_styles_budget(name: str, sign: int) -> None:
    arguments = {"k": 16} if name == "max_at_k" else {"target_n": 128}
    assert sign * _pull_to_daring(name, BUDGET, **arguments) > 3


def test_texts_hold_the_daring_share_and_their_prompts_are_in_no_split() -> None:
    config = replace(BUDGET, steps=10)
    prompts = draw_prompts(config, seed=0)
    assert {name: len(rows) for name, rows in prompts.items()} == {"train": 2000, "val": 48, "test": 48, "policy": 640}
    assert len({prompt for rows in prompts.values() for prompt in rows}) == 2000 + 48 + 48 + 640
    texts = draw_texts(prompts["policy"], config, seed=0)
    assert sum(": daring " in text for text in texts) == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"daring_mean": 0.5}, "daring_mean must be below"),
        ({"daring_sd": 0.5}, "classic_sd < daring_sd"),
        ({"daring_share": 1.0}, "daring_share must be in"),
        ({"hidden_size": 48}, "multiple of head_size=32"),
    ],
)
def test_styles_config_refuses_what_is_no_disagreement(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StylesConfig(**change)


def test_unknown_world_and_size_name_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"world of styles 'style'.*'styles'"):
        styles_config("style")
    with pytest.raises(ValueError, match=r"size of styles 'tny'.*'tiny'"):
        styles_config("styles", "tny")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return build_styles(tmp_path_factory.mktemp("styles") / "tiny", size="tiny", progress=False)


def test_build_styles_trains_the_policy_to_its_share_of_daring_dishes(world: Playground) -> None:
    figures = world.manifest["figures"]
    assert figures["daring_share"] == pytest.approx(0.2, abs=0.08)
    assert figures["failure_share"] < 0.2
    assert figures["distinct_share"] > 0.99
    assert list(figures["best_of_n"].values()) == sorted(figures["best_of_n"].values())


def test_build_styles_writes_what_a_run_needs(world: Playground) -> None:
    assert AutoModelForCausalLM.from_pretrained(world.policy).config.head_dim == 32  # vLLM's CPU attention takes it
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    assert len(tokenizer(" daring plum miso kale")["input_ids"]) == 4
    rows = [json.loads(line) for line in world.train_prompts.read_text().splitlines()]
    assert len(rows) == 64 and rows[0]["id"] == "train-0000"
    assert len(tokenizer(rows[0]["prompt"])["input_ids"]) == 8
    assert rows[0]["styles"] == {"classic": [0.0, 1.0], "daring": [-1.0, 2.0]}
    reward = FunctionReward("tealightning.worlds.styles:dish_reward")
    scores = reward([rows[0]["prompt"]] * 2, [" daring plum miso kale", "?"], [rows[0]] * 2).total
    assert scores[0] > scores[1] == rows[0]["failure"]
    assert world.reward_model is None


def test_build_styles_same_seed_gives_the_same_policy_and_is_reused(world: Playground, tmp_path: Path) -> None:
    again = build_styles(tmp_path / "again", size="tiny", progress=False)
    assert not again.reused
    assert (again.policy / "model.safetensors").read_bytes() == (world.policy / "model.safetensors").read_bytes()
    assert build_styles(world.path, size="tiny", progress=False).reused


def test_build_styles_and_build_playground_refuse_each_others_folders(world: Playground) -> None:
    with pytest.raises(ValueError, match=r"another config.*overwrite=True"):
        build_styles(world.path, world="styles-budget", size="tiny", progress=False)
    with pytest.raises(ValueError, match=r"another config.*overwrite=True"):
        build_prose(world.path, size="tiny", progress=False)


def test_playground_command_builds_a_world_by_name(tmp_path: Path) -> None:
    result = run("playground", "--world", "styles-budget", "--size", "tiny", "--out", tmp_path / "world")
    assert result.status == 0, result.err
    assert load_playground(tmp_path / "world").manifest["config"]["daring_mean"] == -2.6
    assert "invalid choice: 'styels'" in run("playground", "--world", "styels", "--out", tmp_path / "other").err


def test_styles_config_file_trains_a_tail_estimator_with_measured_shares() -> None:
    config = resolved("-c", CONFIGS / "experiments" / "styles.yaml")
    reward = config["rollout"]["reward"]["init_args"]
    assert reward["weights"] == {"dish": 1.0, "daring": 0.0}
    assert config["model"]["init_args"]["estimator"]["init_args"]["target_n"] == 128
    batches = config["data"]["init_args"]["batch_size"] * config["trainer"]["max_steps"]
    assert batches <= StylesConfig().train_prompts  # no training prompt twice
