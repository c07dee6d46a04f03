"""Splits the corpus, cuts paragraphs into a prompt and its real continuation, writes the prompt files."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tealightning.playground.config import PlaygroundConfig
from tealightning.playground.corpus import OPENING_WORDS
from tealightning.playground.tokenizer import tokenize

MIN_CONTINUATION_TOKENS = 8


@dataclass(kw_only=True, slots=True)
class Splits:
    """Disjoint sets of paragraphs."""

    corpus: list[str]  # what tokenizer, policy and reward model are trained on
    heldout: list[str]  # what the manifest's figures are measured on
    train: list[str]  # behind the three prompt files
    val: list[str]
    test: list[str]


@dataclass(kw_only=True, slots=True)
class Opening:
    """The start of a paragraph and how it really goes on."""

    prompt: str
    prompt_ids: list[int]
    continuation_ids: list[int]  # at most completion_tokens; the paragraph may go on


def split_paragraphs(paragraphs: Sequence[str], config: PlaygroundConfig, *, seed: int) -> Splits:
    """A random partition: the sizes that `config` asks for, the rest for training.

    Raises:
        ValueError: if less than half of the paragraphs would be left for training.
    """
    sizes = (config.heldout_paragraphs, config.train_prompts, config.val_prompts, config.test_prompts)
    if sum(sizes) > len(paragraphs) // 2:
        raise ValueError(
            f"heldout_paragraphs + train_prompts + val_prompts + test_prompts must be at most "
            f"{len(paragraphs) // 2}, half of the {len(paragraphs)} paragraphs found in this Python, got {sum(sizes)}."
        )
    shuffled = random.Random(seed).sample(paragraphs, len(paragraphs))
    parts = []
    for size in sizes:
        parts.append(shuffled[:size])
        shuffled = shuffled[size:]
    heldout, train, val, test = parts
    return Splits(corpus=shuffled, heldout=heldout, train=train, val=val, test=test)


def cut_openings(
    paragraphs: Sequence[str], tokenizer: PreTrainedTokenizerFast, config: PlaygroundConfig, *, seed: int
) -> list[Opening]:
    """One opening per paragraph, of a random length in `config.prompt_tokens` and at least `OPENING_WORDS` words.

    A paragraph that cannot be cut so, with `MIN_CONTINUATION_TOKENS` tokens left, is left out.
    """
    rng = random.Random(seed)
    openings = []
    for ids in tokenize(paragraphs, tokenizer):
        cuts = _cuts(tokenizer.convert_ids_to_tokens(ids), config.prompt_tokens)
        if cuts:
            cut = rng.choice(cuts)
            continuation = ids[cut : cut + config.completion_tokens]
            openings.append(
                Opening(prompt=tokenizer.decode(ids[:cut]), prompt_ids=ids[:cut], continuation_ids=continuation)
            )
    return openings


def _cuts(tokens: Sequence[str], lengths: tuple[int, int]) -> list[int]:
    """Where a text may be cut: before a word, so that the prompt alone has the same tokens as in the text."""
    shortest, longest = lengths
    words = [i for i, token in enumerate(tokens) if token.startswith("Ġ")]  # Ġ: the token opens with a space
    last = min(longest, len(tokens) - MIN_CONTINUATION_TOKENS)
    return [i for i in words[OPENING_WORDS - 1 :] if shortest <= i <= last]


def write_prompts(openings: Sequence[Opening], path: Path, *, split: str) -> None:
    """One `{"id": ..., "prompt": ...}` a line; the identifier is the split and a counter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": f"{split}-{i:04d}", "prompt": o.prompt}) for i, o in enumerate(openings))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
