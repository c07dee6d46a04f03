"""Worlds in which the mean and the upper tail disagree: what they are, and their reward.

A prompt asks for a dish ("supper for Ada with lemon and rye:") and the policy answers with a style and three
ingredients (" daring plum miso kale"). How good a dish is, is noise: a normal number made of the prompt and the
completion by a hash. So nothing about ingredients can be learned that holds for another prompt; what can be learned is
the style, and the styles have different means and spreads.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.types import Prompt

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


@dataclass(kw_only=True, slots=True, frozen=True)
class StylesConfig:
    """Everything that decides a world of styles, together with the seed. The defaults are the world "styles".

    Args:
        classic_mean: Mean reward of classic dishes.
        classic_sd: Their standard deviation.
        daring_mean: Mean reward of daring dishes, below `classic_mean`.
        daring_sd: Their standard deviation, above `classic_sd`.
        daring_share: Probability of the daring style that the policy is trained to start with.
        failure: Reward of a completion that is no dish: no style to begin with, or fewer than three ingredients.
        hidden_size: Width of the policy, a multiple of `head_size`.
        intermediate_size: Width of its feed-forward layers.
        head_size: Width of one attention head; vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
        layers: Depth of the policy.
        steps: Optimizer steps of its training, on a new text each.
        batch_size: Texts a step.
        lr: Peak AdamW learning rate of its embeddings, head and norms (linear warm-up, cosine decay).
        muon_lr: Peak Muon learning rate of its layers' matrices.
        train_prompts: Prompts in `prompts/train.jsonl`: enough that a training run repeats none.
        val_prompts: Prompts in `prompts/val.jsonl`.
        test_prompts: Prompts in `prompts/test.jsonl`.
        curve_samples: Samples of each validation prompt behind the figures of the manifest.
        num_threads: Torch threads of the build; fixed, because sums depend on it in the last bit.
    """

    classic_mean: float = 0.0
    classic_sd: float = 1.0
    daring_mean: float = -1.0
    daring_sd: float = 2.0
    daring_share: float = 0.2
    failure: float = -8.0
    hidden_size: int = 64
    intermediate_size: int = 192
    head_size: int = 32
    layers: int = 2
    steps: int = 600
    batch_size: int = 64
    lr: float = 5e-3
    muon_lr: float = 1e-2
    train_prompts: int = 2000
    val_prompts: int = 48
    test_prompts: int = 48
    curve_samples: int = 128
    num_threads: int = 1

    def __post_init__(self) -> None:
        if not self.daring_mean < self.classic_mean:
            raise UserError(
                f"daring_mean must be below classic_mean={self.classic_mean}, so that the styles differ in what they "
                f"are good for, got {self.daring_mean}."
            )
        if not 0 < self.classic_sd < self.daring_sd:
            raise UserError(
                f"the standard deviations must be 0 < classic_sd < daring_sd, got {self.classic_sd}, {self.daring_sd}."
            )
        if not 0 < self.daring_share < 1:
            raise UserError(f"daring_share must be in (0, 1), got {self.daring_share}.")
        if self.hidden_size % self.head_size:
            raise UserError(f"hidden_size must be a multiple of head_size={self.head_size}, got {self.hidden_size}.")


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
    """The configuration of a named world.

    Raises:
        ValueError: for an unknown name, with the valid ones.
    """
    for what, name, valid in (("world", world, STYLE_WORLDS), ("size", size, STYLE_SIZES)):
        if name not in valid:
            raise UserError(f"Unknown {what} of styles {name!r}.{did_you_mean(name, valid)}")
    return StylesConfig(**STYLE_WORLDS[world] | STYLE_SIZES[size])


def dish_reward(
    *, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """`mean + sd * z` of the completion's style, `z = Phi^-1(hash(prompt, completion))`.

    Args:
        prompts: [B].
        completions: [B].
        metadata: [B], with "styles": {style: [mean, sd]} and "failure", the reward of what is no dish.

    Returns:
        [B]; a dish has the same reward whenever it is served to the same prompt.
    """
    return [_reward(*row) for row in zip(prompts, completions, metadata, strict=True)]


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
    """`E[max of n]` of a policy that is daring with a given probability: the integral of `x d F(x)^n`,
    `F = (1-p) F_classic + p F_daring`."""
    widest = 12 * config.daring_sd
    x = np.linspace(min(config.daring_mean, config.classic_mean) - widest, config.classic_mean + widest, 20_001)
    below = (1 - daring_share) * ndtr((x - config.classic_mean) / config.classic_sd) + daring_share * ndtr(
        (x - config.daring_mean) / config.daring_sd
    )
    return float(x[-1] - np.trapezoid(below**n, x))


def _reward(prompt: Prompt, completion: str, metadata: dict[str, Any]) -> float:
    style = style_of(completion)
    if style is None:
        return float(metadata["failure"])
    mean, sd = metadata["styles"][style]
    return float(mean + sd * _normal(f"{prompt}\n{' '.join(completion.split())}"))


def _normal(text: str) -> float:
    """A standard normal number that looks random and depends on the text alone, within +-8.2."""
    bits = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12
    return float(ndtri((bits + 0.5) / 2**52))
