"""Worlds in which the mean and the upper tail disagree: what they are, their reward, and how they are built.

A prompt asks for a dish ("supper for Ada with lemon and rye:") and the policy answers with a style and three
ingredients (" daring plum miso kale"). How good a dish is, is noise: a normal number made of the prompt and the
completion by a hash. So nothing about ingredients can be learned that holds for another prompt; what can be learned is
the style, and the styles have different means and spreads.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.errors import UserError
from tealightning.types import Prompt
from tealightning.worlds import folder as worlds
from tealightning.worlds import policy as lm

RECIPE = {"format_version": 1, "kind": "styles"}

CLASSIC, DARING = "classic", "daring"
_WORDS = """
almond anise apple barley basil bean beet butter cabbage caper carrot celery cherry chili cider clam
cocoa corn cream cumin date dill fennel fig garlic ginger grape ham honey kale leek lemon
lentil lime mango maple melon mint miso mussel nutmeg oat olive onion orange papaya parsley pea
peach pear pepper plum potato quince radish rice rye saffron sage salmon sesame spinach thyme tofu
"""
INGREDIENTS = tuple(_WORDS.split())
DISH_INGREDIENTS = 3
"""64^3 = 262,144 dishes of each style: among 128 samples of a prompt, duplicates are rare."""

MEALS = ("breakfast", "brunch", "lunch", "dinner", "supper", "dessert")
_NAMES = """
Ada Ben Cleo Dev Ewa Finn Gita Hugo Ines Jun Kofi Lena Milo Nora Omar Pia Quinn Rosa Sven Tara Uri Vera Wim Zoe
"""
GUESTS = tuple(_NAMES.split())
PROMPT_TOKENS = 8  # "supper for Ada with lemon and rye:"
COMPLETION_TOKENS = 1 + DISH_INGREDIENTS  # " daring plum miso kale", before the end-of-text token
TEXT_TOKENS = PROMPT_TOKENS + COMPLETION_TOKENS + 1  # with the end-of-text token
VOCAB_LIMIT = 2000  # merges end earlier, when every word is a token


@dataclass(kw_only=True, slots=True, frozen=True)
class StylesConfig:
    """Everything that decides a world of styles, together with the seed. The defaults are the world "styles"."""

    classic_mean: float = 0.0  # reward of classic dishes
    classic_sd: float = 1.0
    daring_mean: float = -1.0  # below classic_mean
    daring_sd: float = 2.0  # above classic_sd
    daring_share: float = 0.2  # probability of the daring style that the policy is trained to start with
    failure: float = -8.0  # reward of what is no dish: no style to begin with, or fewer than three ingredients
    hidden_size: int = 64  # width of the policy, a multiple of head_size
    intermediate_size: int = 192
    head_size: int = 32  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
    layers: int = 2
    steps: int = 600  # optimizer steps of the policy
    batch_size: int = 64  # texts a step, each new
    lr: float = 5e-3  # see `lm.train`
    muon_lr: float = 1e-2
    train_prompts: int = 2000  # in prompts/train.jsonl: enough that a training run repeats none
    val_prompts: int = 48
    test_prompts: int = 48
    curve_samples: int = 128  # of each validation prompt, behind the figures of the manifest
    num_threads: int = 1  # of torch; fixed, because sums depend on it in the last bit

    def __post_init__(self) -> None:
        if not self.daring_mean < self.classic_mean:
            raise UserError(f"daring_mean must be below classic_mean={self.classic_mean}, got {self.daring_mean}.")
        if not 0 < self.classic_sd < self.daring_sd:
            raise UserError(f"0 < classic_sd < daring_sd must hold, got {self.classic_sd}, {self.daring_sd}.")
        if not 0 < self.daring_share < 1:
            raise UserError(f"daring_share must be in (0, 1), got {self.daring_share}.")
        lm.check_sizes(self)

    @property
    def reward_metadata(self) -> dict[str, Any]:
        """Columns that `dish_reward` reads, as they are written next to each prompt."""
        styles = {CLASSIC: [self.classic_mean, self.classic_sd], DARING: [self.daring_mean, self.daring_sd]}
        return {"styles": styles, "failure": self.failure}


STYLE_WORLDS: dict[str, dict[str, Any]] = {
    "styles": {},
    "styles-budget": dict(daring_mean=-2.6, daring_sd=2.2, daring_share=0.5),
}
"""`styles`: the mean favours classic, every best of n from 4 on daring. `styles-budget`: the mean and the best of 16
favour classic, the best of 128 daring."""

STYLE_SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": dict(
        hidden_size=32, intermediate_size=64, layers=1, steps=120, train_prompts=64, val_prompts=8, test_prompts=8
    ),
}


def styles_config(world: str, size: str = "default") -> StylesConfig:
    """The configuration of a named world."""
    named = worlds.named_settings("world of styles", world, STYLE_WORLDS)
    return StylesConfig(**named | worlds.named_settings("size of styles", size, STYLE_SIZES))


def dish_reward(
    *, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """`mean + sd * z` of the completion's style, `z = Phi^-1(hash(prompt, completion))`, within 8.2 of 0.

    `metadata` has "styles": {style: [mean, sd]} and "failure", the reward of what is no dish. A dish has the same
    reward whenever it is served to the same prompt.
    """
    rewards = []
    for prompt, completion, columns in zip(prompts, completions, metadata, strict=True):
        style = style_of(completion)
        if style is None:
            rewards.append(float(columns["failure"]))
            continue
        mean, sd = columns["styles"][style]
        text = f"{prompt}\n{' '.join(completion.split())}"
        bits = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12
        rewards.append(float(mean + sd * float(ndtri((bits + 0.5) / 2**52))))
    return rewards


def is_daring(
    *, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """[B]: 1 for a daring dish, 0 for a classic one, NaN for what is no dish. To be measured beside the reward."""
    styles = map(style_of, completions)
    return [math.nan if style is None else float(style == DARING) for style in styles]


def style_of(completion: str) -> str | None:
    """The style of a dish, a style followed by three words or more; None for what is none."""
    style, *words = completion.split() or [""]
    return style if style in (CLASSIC, DARING) and len(words) >= DISH_INGREDIENTS else None


def mixture_best_of_n(config: StylesConfig, daring_share: float, n: int) -> float:
    """Best-of-n of a policy that is daring with probability p, with which the manifest's figures are compared.

    integral of x d F(x)^n,     F = (1-p) F_classic + p F_daring
    """
    widest = 12 * config.daring_sd
    x = np.linspace(min(config.daring_mean, config.classic_mean) - widest, config.classic_mean + widest, 20_001)
    below = (1 - daring_share) * ndtr((x - config.classic_mean) / config.classic_sd) + daring_share * ndtr(
        (x - config.daring_mean) / config.daring_sd
    )
    return float(x[-1] - np.trapezoid(below**n, x))


def build_styles(
    out: Path | str,
    *,
    world: str | StylesConfig = "styles",
    seed: int = 0,
    size: str = "default",
    progress: bool = True,
    overwrite: bool = False,
) -> worlds.Playground:
    """Build `out` (policy/, prompts/{train,val,test}.jsonl, playground.json), or reuse it; see `build_prose`.

    Args:
        world: A name in `STYLE_WORLDS`, or a configuration of your own.
        size: A name in `STYLE_SIZES`; of no effect beside a configuration.
    """
    config = world if isinstance(world, StylesConfig) else styles_config(world, size)
    return worlds.build_folder(out, RECIPE, config, _fill, seed=seed, progress=progress, overwrite=overwrite)


worlds.WORLDS.update({name: partial(build_styles, world=name) for name in STYLE_WORLDS})


def _fill(folder: Path, config: StylesConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """Write policy and prompts; returns what the manifest says of them."""
    seed_of = partial(worlds.stream_seed, seed)
    prompts = draw_prompts(config, seed=seed_of("prompts"))
    written = {
        split: worlds.write_prompts(folder, split, ({"prompt": p} | config.reward_metadata for p in prompts[split]))
        for split in worlds.PROMPT_SPLITS
    }
    texts = draw_texts(prompts["policy"], config, seed=seed_of("texts"))
    tokenizer = lm.train_tokenizer(texts, vocab_size=VOCAB_LIMIT, max_positions=4 * TEXT_TOKENS)
    lengths = {len(ids) for ids in lm.tokenize(texts, tokenizer)}
    assert lengths == {TEXT_TOKENS - 1}, f"every word must be one token, got texts of {lengths} tokens"
    policy = lm.train_policy(
        texts,
        tokenizer,
        lm.llama_config(tokenizer, config, layers=config.layers, max_positions=4 * TEXT_TOKENS),
        steps=config.steps,
        batch_size=config.batch_size,
        sequence_length=TEXT_TOKENS - 1,  # a row is exactly one text: prompts stand where they do in rollouts
        lr=config.lr,
        muon_lr=config.muon_lr,
        seed=seed_of("policy"),
        progress=progress,
    )
    figures = _measure(policy, tokenizer, prompts["val"], config, seed=seed_of("figures"))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return {"prompts": written, "policy_parameters": policy.num_parameters(), "figures": figures}


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


def _measure(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], config: StylesConfig, *, seed: int
) -> dict[str, Any]:
    """Figures of the policy's samples: shares of styles and failures, duplicates, best-of-n and what it should be."""
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(config.curve_samples)]
    dishes = lm.sample_completions(policy, tokenizer, repeated, max_new_tokens=COMPLETION_TOKENS + 1, batch_size=1024)
    styles = [style_of(dish) for dish in dishes]
    share = styles.count(DARING) / len(styles)
    scores = dish_reward(prompts=repeated, completions=dishes, metadata=[config.reward_metadata] * len(dishes))
    curve = worlds.best_of_n_curve(torch.tensor(scores, dtype=torch.float64).view(len(prompts), -1))
    return {
        "daring_share": share,
        "failure_share": styles.count(None) / len(styles),
        "distinct_share": len(set(zip(repeated, dishes, strict=True))) / len(dishes),
        "best_of_n": curve,
        "best_of_n_of_this_share": {n: mixture_best_of_n(config, share, int(n)) for n in curve},
    }
