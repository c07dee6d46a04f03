"""Text of the prose world: paragraphs that every Python installation carries, splits, and prompts cut from them."""

import ast
import random
import re
import sysconfig
import tokenize as python_tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tealightning.errors import UserError
from tealightning.worlds.policy import tokenize
from tealightning.worlds.prose_config import ProseConfig

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


def collect_paragraphs(*, source_files: bool = True) -> list[str]:
    """Paragraphs of prose from `pydoc_data.topics` and, with `source_files`, from the standard library's docstrings and
    comments.

    Each paragraph is one line, starts differently from every other one and is at least `MIN_CHARACTERS` long. Nothing
    is imported but the topics (a module of plain data): the source files are parsed.

    Raises:
        ValueError: if this Python comes without both (a stripped-down installation).
    """
    texts = list(_topics())
    if source_files:
        texts += _source_texts(Path(sysconfig.get_paths()["stdlib"]))
    paragraphs = _distinct_openings(_prose(texts))
    if not paragraphs:
        raise UserError(
            "No prose found in this Python: it has neither pydoc_data.topics nor the standard library's source files. "
            "Use a full installation of Python (python.org, pyenv, conda or the distribution's own)."
        )
    return paragraphs


def _topics() -> Iterator[str]:
    """The texts behind `help("topic")`, in alphabetical order of the topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    yield from (topics[name] for name in sorted(topics))


def _source_texts(root: Path) -> Iterator[str]:
    """Every docstring and block of comments below `root` in the order of the files' names, nothing imported."""
    for path in sorted(root.rglob("*.py")):
        if not _EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            with python_tokenize.open(path) as file:  # obeys the coding comment
                source = file.read()
            yield from _docstrings(source)
        except (SyntaxError, UnicodeDecodeError, OSError):  # templates and the like that are no Python
            continue
        yield from _comments(source)


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]


def _comments(source: str) -> Iterator[str]:
    """The text of each run of lines that are comments."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("# "))
        elif block:
            yield "\n".join(block)
            block = []


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
