"""Builds a world of styles: a policy that answers in two styles, and prompts that carry what the reward needs."""

import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.functional.best_of_n import best_of_n
from tealightning.worlds.folder import PROMPT_SPLITS, Playground, build_folder, package_versions, stream_seed
from tealightning.worlds.policy import sample_completions, train_policy
from tealightning.worlds.prose_config import ProseConfig
from tealightning.worlds.prose_figures import CURVE_NS
from tealightning.worlds.styles import (
    CLASSIC,
    DARING,
    DISH_INGREDIENTS,
    INGREDIENTS,
    StylesConfig,
    dish_reward,
    mixture_best_of_n,
    style_of,
    styles_config,
)
from tealightning.worlds.tokenizer import tokenize, train_tokenizer

FORMAT_VERSION = 1
"""Raised with every change of the recipe."""

MEALS = ("breakfast", "brunch", "lunch", "dinner", "supper", "dessert")
_NAMES = """
Ada Ben Cleo Dev Ewa Finn Gita Hugo Ines Jun Kofi Lena Milo Nora Omar Pia Quinn Rosa Sven Tara Uri Vera Wim Zoe
"""
GUESTS = tuple(_NAMES.split())
PROMPT_TOKENS = 8  # "supper for Ada with lemon and rye:"
COMPLETION_TOKENS = 1 + DISH_INGREDIENTS  # " daring plum miso kale", before the end-of-text token
VOCAB_LIMIT = 2000  # merges end earlier, when every word is a token


def build_styles(
    out: Path | str,
    *,
    world: str | StylesConfig = "styles",
    seed: int = 0,
    size: str = "default",
    progress: bool = True,
    overwrite: bool = False,
) -> Playground:
    """Build `out` (policy/, prompts/{train,val,test}.jsonl, playground.json), or reuse it; see `build_prose`.

    The reward is `tealightning.worlds.styles:dish_reward`.

    Args:
        out: Folder to create. A world of the same configuration and seed there is returned as it is.
        world: A name in `STYLE_WORLDS`, or a configuration of your own.
        seed: Of prompts, texts, initial weights, batches and samples.
        size: A name in `STYLE_SIZES`; of no effect beside a configuration.
        progress: Show progress bars and say what happens.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` is something else than the world asked for, or a name is unknown.
    """
    config = world if isinstance(world, StylesConfig) else styles_config(world, size)
    wanted = {"format_version": FORMAT_VERSION, "kind": "styles", "seed": seed, "config": asdict(config)}
    return build_folder(
        Path(out),
        wanted,
        lambda folder: _build_into(folder, config, seed=seed, progress=progress),
        num_threads=config.num_threads,
        progress=progress,
        overwrite=overwrite,
    )


def _build_into(folder: Path, config: StylesConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    started = time.perf_counter()
    prompts = draw_prompts(config, seed=stream_seed(seed, "prompts"))
    for split in PROMPT_SPLITS:
        _write_prompts(prompts[split], folder / "prompts" / f"{split}.jsonl", split=split, config=config)
    texts = draw_texts(prompts["policy"], config, seed=stream_seed(seed, "texts"))
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_LIMIT, max_positions=4 * _text_tokens())
    lengths = {len(ids) for ids in tokenize(texts, tokenizer)}
    assert lengths == {_text_tokens() - 1}, f"every word must be one token, got texts of {lengths} tokens"
    policy = train_policy(
        texts, tokenizer, _policy_training(config), seed=stream_seed(seed, "policy"), progress=progress
    )
    figures = measure_styles(policy, tokenizer, prompts["val"], config, seed=stream_seed(seed, "figures"))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return {
        "prompts": {split: len(prompts[split]) for split in PROMPT_SPLITS},
        "policy_parameters": policy.num_parameters(),
        "figures": figures,
        "versions": package_versions(),
        "build_seconds": time.perf_counter() - started,
    }


def draw_prompts(config: StylesConfig, *, seed: int) -> dict[str, list[str]]:
    """Different prompts for "train", "val" and "test" and, for the texts that the policy is trained on, "policy"."""
    every = [
        f"{meal} for {guest} with {first} and {second}:"
        for meal, guest, first, second in itertools.product(MEALS, GUESTS, INGREDIENTS, INGREDIENTS)
        if first != second
    ]
    sizes = {
        "train": config.train_prompts,
        "val": config.val_prompts,
        "test": config.test_prompts,
        "policy": config.steps * config.batch_size,
    }
    drawn = iter(random.Random(seed).sample(every, sum(sizes.values())))
    return {name: list(itertools.islice(drawn, size)) for name, size in sizes.items()}


def draw_texts(prompts: Sequence[str], config: StylesConfig, *, seed: int) -> list[str]:
    """Each prompt with a dish: `daring_share` of them daring (exactly, but for rounding), the ingredients uniform."""
    rng = random.Random(seed)
    daring = round(config.daring_share * len(prompts))
    styles = rng.sample([DARING] * daring + [CLASSIC] * (len(prompts) - daring), len(prompts))
    return [
        " ".join([prompt, style, *rng.choices(INGREDIENTS, k=DISH_INGREDIENTS)])
        for prompt, style in zip(prompts, styles, strict=True)
    ]


def measure_styles(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    config: StylesConfig,
    *,
    seed: int,
) -> dict[str, Any]:
    """Figures of the policy's samples: shares of styles and failures, duplicates, best-of-n and what it should be."""
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(config.curve_samples)]
    sampled = sample_completions(
        policy, tokenizer, tokenize(repeated, tokenizer), max_new_tokens=COMPLETION_TOKENS + 1, batch_size=1024
    )
    dishes = [tokenizer.decode(ids) for ids in sampled]
    styles = [style_of(dish) for dish in dishes]
    share = styles.count(DARING) / len(styles)
    rewards = dish_reward(prompts=repeated, completions=dishes, metadata=[reward_metadata(config)] * len(dishes))
    ns = [n for n in CURVE_NS if n <= config.curve_samples]
    curve = best_of_n(torch.tensor(rewards, dtype=torch.float64).view(len(prompts), -1), ns).mean(0)
    return {
        "daring_share": share,
        "failure_share": styles.count(None) / len(styles),
        "distinct_share": len(set(zip(repeated, dishes, strict=True))) / len(dishes),
        "best_of_n": _by_n(ns, curve),
        "best_of_n_of_this_share": {str(n): mixture_best_of_n(config, share, n) for n in ns},
    }


def reward_metadata(config: StylesConfig) -> dict[str, Any]:
    """What `dish_reward` reads beside prompt and completion, as it is written next to each prompt."""
    return {
        "styles": {
            CLASSIC: [config.classic_mean, config.classic_sd],
            DARING: [config.daring_mean, config.daring_sd],
        },
        "failure": config.failure,
    }


def _by_n(ns: Sequence[int], curve: Tensor) -> dict[str, float]:
    return {str(n): value for n, value in zip(ns, curve.tolist(), strict=True)}


def _write_prompts(prompts: Sequence[str], path: Path, *, split: str, config: StylesConfig) -> None:
    """One `{"id": ..., "prompt": ..., "styles": ..., "failure": ...}` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"id": f"{split}-{i:04d}", "prompt": p} | reward_metadata(config) for i, p in enumerate(prompts))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _text_tokens() -> int:
    """Tokens of a text with its end-of-text token."""
    return PROMPT_TOKENS + COMPLETION_TOKENS + 1


def _policy_training(config: StylesConfig) -> ProseConfig:
    """The settings of `train_policy`. A row is exactly one text, so that prompts stand where they do in rollouts."""
    return ProseConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        head_size=config.head_size,
        policy_layers=config.layers,
        reward_layers=1,
        max_positions=4 * _text_tokens(),
        sequence_length=_text_tokens() - 1,
        policy_steps=config.steps,
        policy_batch_size=config.batch_size,
        policy_lr=config.lr,
        policy_muon_lr=config.muon_lr,
        prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS),
        completion_tokens=COMPLETION_TOKENS + 1,
    )
