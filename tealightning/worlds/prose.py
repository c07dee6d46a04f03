"""Configuration and text of the prose world: paragraphs that every Python installation carries, and prompts."""

import ast
import contextlib
import itertools
import random
import re
import sysconfig
import tokenize as python_tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast as Tokenizer

from tealightning.errors import UserError
from tealightning.worlds.folder import named_settings
from tealightning.worlds.policy import check_sizes, tokenize

MIN_CHARACTERS = 60
"""Shorter paragraphs leave no room for a prompt and a continuation."""
MIN_CONTINUATION_TOKENS = 8
OPENING_WORDS = 4
"""No two paragraphs share their first words, this many: prompts of at least as many words cannot coincide."""

_EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__pycache__",
}  # fmt: skip
_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_LIKE = re.compile(r"[A-Z].*[.!?:)]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?:] (?=[A-Z])")
_MARKUP = re.compile(r"[*`]+|\s?\[\d+\]|\s?\(\*\*note.*?\)")
_CODE_MARKS = (">>>", "::", "====", "----", "|")


@dataclass(kw_only=True, slots=True, frozen=True)
class ProseConfig:
    """Everything that decides a prose world, together with the seed. The defaults are the "default" preset."""

    source_files: bool = True  # read the standard library's docstrings and comments, not only the language reference
    vocab_size: int = 1536  # of the byte-level BPE, special tokens included (at least 300)
    hidden_size: int = 128  # width of the policy and of the reward model, a multiple of head_size
    intermediate_size: int = 384
    head_size: int = 32  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
    policy_layers: int = 3
    reward_layers: int = 2  # the reward model starts as the policy's first layers
    max_positions: int = 256  # longest sequence of both models, in tokens
    sequence_length: int = 128  # of the policy's training rows, in tokens
    policy_steps: int = 750  # optimizer steps
    policy_batch_size: int = 8  # rows a step
    policy_lr: float = 8e-3  # see `train`
    policy_muon_lr: float = 1.5e-2
    reward_pairs: int = 6400  # of a real and a sampled continuation, to train the reward model on
    reward_steps: int = 200
    reward_batch_size: int = 32  # pairs a step
    reward_lr: float = 3e-3
    reward_muon_lr: float = 5e-3
    reward_weight_decay: float = 0.1
    prompt_tokens: tuple[int, int] = (8, 24)  # shortest and longest prompt
    completion_tokens: int = 32  # longest continuation that the reward model is trained on
    # Paragraphs behind those pairs. The policy has not seen them: on its own training text it is less surprised than
    # by its samples, and a reward model would learn that instead.
    reward_paragraphs: int = 2300
    heldout_paragraphs: int = 300  # for the figures of the manifest
    heldout_pairs: int = 600  # cut from them, to judge the reward model on
    train_prompts: int = 800  # paragraphs behind prompts/train.jsonl
    val_prompts: int = 96
    test_prompts: int = 96
    curve_prompts: int = 16  # held-out prompts of the manifest's best-of-n curve
    curve_samples: int = 128  # of each of them
    num_threads: int = 1  # of torch; fixed, because sums depend on it in the last bit

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise UserError(f"vocab_size must be at least 300 (bytes, special tokens), got {self.vocab_size}.")
        check_sizes(self)
        if not 1 <= self.reward_layers <= self.policy_layers:
            raise UserError(f"reward_layers must be 1 to policy_layers={self.policy_layers}, got {self.reward_layers}.")
        shortest, longest = self.prompt_tokens
        if not 1 <= shortest <= longest:
            raise UserError(f"prompt_tokens must have 1 <= shortest <= longest, got {shortest, longest}.")
        needed = max(longest + self.completion_tokens, self.sequence_length)
        if self.max_positions < needed:
            raise UserError(
                f"max_positions must be at least {needed} (longest prompt + completion_tokens, and sequence_length), "
                f"got {self.max_positions}."
            )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": dict(
        source_files=False, vocab_size=512, hidden_size=32, intermediate_size=96, policy_layers=2, max_positions=128,
        sequence_length=64, policy_steps=80, policy_batch_size=16, policy_lr=1e-2, reward_pairs=1500, reward_steps=120,
        reward_batch_size=16, prompt_tokens=(8, 16), completion_tokens=16, reward_paragraphs=100,
        heldout_paragraphs=64, heldout_pairs=300, train_prompts=64, val_prompts=16, test_prompts=16, curve_prompts=4,
    ),
}  # fmt: skip
"""Presets, as differences from the defaults. "default" is for use; "tiny" builds in seconds, for tests."""


def prose_config(size: str | ProseConfig) -> ProseConfig:
    """The configuration of a preset, or `size` itself if it is one."""
    return size if isinstance(size, ProseConfig) else ProseConfig(**named_settings("playground size", size, PRESETS))


def collect_paragraphs(*, source_files: bool = True) -> list[str]:
    """Paragraphs of prose, one line each, from `pydoc_data.topics` and the standard library's docstrings and comments.

    Nothing is imported but the topics (a module of plain data): the source files are parsed.
    """
    texts: list[str] = []
    with contextlib.suppress(ImportError):  # some distributions package it separately
        from pydoc_data.topics import topics

        texts += (topics[name] for name in sorted(topics))
    if source_files:
        texts += _source_texts(Path(sysconfig.get_paths()["stdlib"]))
    paragraphs = _distinct_openings(_prose(texts))
    if not paragraphs:
        raise UserError(
            "No prose found in this Python: it has neither pydoc_data.topics nor the standard library's source files. "
            "Use a full installation of Python (python.org, pyenv, conda or the distribution's own)."
        )
    return paragraphs


def _source_texts(root: Path) -> Iterator[str]:
    """Every docstring and block of comments below `root` in the order of the files' names, nothing imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if not _EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            with python_tokenize.open(path) as file, warnings.catch_warnings():  # obeys the coding comment
                warnings.simplefilter("ignore")  # old escape sequences
                source = file.read()
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):  # templates and the like that are no Python
            continue
        yield from (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
        lines = map(str.strip, source.splitlines())
        for is_comment, block in itertools.groupby(lines, lambda line: line.startswith("#")):
            if is_comment:
                yield "\n".join(line.lstrip("# ") for line in block)


def _prose(texts: Iterable[str]) -> Iterator[str]:
    """The paragraphs that read as sentences, each on one line and without markup."""
    for text in texts:
        for block in _BLANK_LINE.split(text):
            if any(mark in block for mark in _CODE_MARKS):
                continue
            paragraph = _MARKUP.sub("", " ".join(block.split()))
            letters = sum(c.isalpha() or c == " " for c in paragraph)
            if (
                len(paragraph) >= MIN_CHARACTERS
                and paragraph.isascii()
                and _SENTENCE_LIKE.fullmatch(paragraph)
                and letters >= 0.88 * len(paragraph)
            ):
                yield paragraph


def _distinct_openings(paragraphs: Iterable[str]) -> list[str]:
    """The first paragraph of each opening: copies, and prompts that two splits would share, go."""
    first: dict[tuple[str, ...], str] = {}
    for paragraph in paragraphs:
        first.setdefault(tuple(paragraph.lower().split()[:OPENING_WORDS]), paragraph)
    return list(first.values())


def split_paragraphs(paragraphs: Sequence[str], config: ProseConfig, *, seed: int) -> dict[str, list[str]]:
    """A random partition: `corpus` (for the tokenizer and the policy), `reward` (for the reward model), `heldout` (for
    the manifest's figures), and `train`, `val` and `test` (behind the prompt files).

    The corpus is what is left of the sizes that `config` asks for: half of the paragraphs at least.
    """
    sizes = {
        "reward": config.reward_paragraphs,
        "heldout": config.heldout_paragraphs,
        "train": config.train_prompts,
        "val": config.val_prompts,
        "test": config.test_prompts,
    }
    total = sum(sizes.values())
    if total > len(paragraphs) // 2:
        raise UserError(
            f"reward_paragraphs + heldout_paragraphs + train_prompts + val_prompts + test_prompts must be at most "
            f"{len(paragraphs) // 2}, half of the {len(paragraphs)} paragraphs found in this Python, got {total}."
        )
    shuffled = random.Random(seed).sample(paragraphs, len(paragraphs))
    drawn = iter(shuffled)
    return {"corpus": shuffled[total:]} | {name: list(itertools.islice(drawn, size)) for name, size in sizes.items()}


@dataclass(kw_only=True, slots=True)
class Opening:
    """The start of a paragraph and how it really goes on."""

    prompt: str
    prompt_ids: list[int]
    continuation_ids: list[int]  # at most completion_tokens; the paragraph may go on


def cut_openings(
    paragraphs: Sequence[str], tokenizer: Tokenizer, config: ProseConfig, *, rng: random.Random
) -> list[Opening]:
    """One opening per paragraph, of a random length in `config.prompt_tokens` and at least `OPENING_WORDS` words.

    A paragraph that cannot be cut so, with `MIN_CONTINUATION_TOKENS` tokens left, is left out. Cuts are before a word,
    so that the prompt alone has the same tokens as in the text.
    """
    openings = []
    shortest, longest = config.prompt_tokens
    for ids in tokenize(paragraphs, tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        words = [i for i, token in enumerate(tokens) if token.startswith("Ġ")]  # Ġ: the token opens with a space
        last = min(longest, len(tokens) - MIN_CONTINUATION_TOKENS)
        cuts = [i for i in words[OPENING_WORDS - 1 :] if shortest <= i <= last]
        if cuts:
            cut = rng.choice(cuts)
            continuation = ids[cut : cut + config.completion_tokens]
            openings.append(
                Opening(prompt=tokenizer.decode(ids[:cut]), prompt_ids=ids[:cut], continuation_ids=continuation)
            )
    return openings


def cut_many_openings(
    paragraphs: Sequence[str], tokenizer: Tokenizer, config: ProseConfig, *, count: int, rng: random.Random
) -> list[Opening]:
    """`count` openings in random order: every sentence may start one, and each is cut anew as often as needed."""
    starts = from_each_sentence(paragraphs)
    openings: list[Opening] = []
    while len(openings) < count:
        fresh = cut_openings(starts, tokenizer, config, rng=rng)
        assert fresh, "no paragraph can be cut"
        openings += rng.sample(fresh, min(len(fresh), count - len(openings)))
    return openings


def from_each_sentence(paragraphs: Sequence[str]) -> list[str]:
    """The paragraphs, and what is left of each from its second, third, ... sentence on if that is long enough."""
    starts = [(p, [0, *(match.end() for match in _SENTENCE_END.finditer(p))]) for p in paragraphs]
    return [p[i:] for p, positions in starts for i in positions if len(p) - i >= MIN_CHARACTERS]
