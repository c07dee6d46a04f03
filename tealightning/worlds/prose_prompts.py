"""Splits the corpus, cuts paragraphs into a prompt and its real continuation, writes the prompt files."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tealightning.errors import UserError
from tealightning.worlds.prose_config import ProseConfig
from tealightning.worlds.prose_corpus import MIN_CHARACTERS, OPENING_WORDS
from tealightning.worlds.tokenizer import tokenize

MIN_CONTINUATION_TOKENS = 8

_SENTENCE_END = re.compile(r"[.!?:] (?=[A-Z])")


@dataclass(kw_only=True, slots=True)
class Splits:
    """Disjoint sets of paragraphs."""

    corpus: list[str]  # what the tokenizer and the policy are trained on
    reward: list[str]  # what the reward model is trained on
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


def split_paragraphs(paragraphs: Sequence[str], config: ProseConfig, *, seed: int) -> Splits:
    """A random partition: the sizes that `config` asks for, the rest for training.

    Raises:
        ValueError: if less than half of the paragraphs would be left for training.
    """
    sizes = (
        config.reward_paragraphs,
        config.heldout_paragraphs,
        config.train_prompts,
        config.val_prompts,
        config.test_prompts,
    )
    if sum(sizes) > len(paragraphs) // 2:
        raise UserError(
            f"reward_paragraphs + heldout_paragraphs + train_prompts + val_prompts + test_prompts must be at most "
            f"{len(paragraphs) // 2}, half of the {len(paragraphs)} paragraphs found in this Python, got {sum(sizes)}."
        )
    shuffled = random.Random(seed).sample(paragraphs, len(paragraphs))
    parts = []
    for size in sizes:
        parts.append(shuffled[:size])
        shuffled = shuffled[size:]
    reward, heldout, train, val, test = parts
    return Splits(corpus=shuffled, reward=reward, heldout=heldout, train=train, val=val, test=test)


def from_each_sentence(paragraphs: Sequence[str]) -> list[str]:
    """The paragraphs, and what is left of each from its second, third, ... sentence on if that is long enough."""
    starts = [(p, [0, *(match.end() for match in _SENTENCE_END.finditer(p))]) for p in paragraphs]
    return [p[i:] for p, positions in starts for i in positions if len(p) - i >= MIN_CHARACTERS]


def cut_openings(
    paragraphs: Sequence[str], tokenizer: PreTrainedTokenizerFast, config: ProseConfig, *, rng: random.Random
) -> list[Opening]:
    """One opening per paragraph, of a random length in `config.prompt_tokens` and at least `OPENING_WORDS` words.

    A paragraph that cannot be cut so, with `MIN_CONTINUATION_TOKENS` tokens left, is left out.
    """
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


def cut_many_openings(
    paragraphs: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: ProseConfig,
    *,
    count: int,
    rng: random.Random,
) -> list[Opening]:
    """`count` openings in random order: every sentence may start one, and each is cut anew as often as needed."""
    starts = from_each_sentence(paragraphs)
    openings: list[Opening] = []
    while len(openings) < count:
        fresh = cut_openings(starts, tokenizer, config, rng=rng)
        assert fresh, "no paragraph can be cut"
        openings += rng.sample(fresh, min(len(fresh), count - len(openings)))
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
