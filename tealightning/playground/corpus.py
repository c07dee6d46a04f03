"""English prose that every Python installation carries: its language reference and its docstrings."""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_CHARACTERS = 60
"""Shorter paragraphs leave no room for a prompt and a continuation."""

_EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__pycache__",
}  # fmt: skip
_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_LIKE = re.compile(r"[A-Z].*[.!?:)]", re.DOTALL)
_MARKUP = re.compile(r"[*`]+|\s?\[\d+\]|\s?\(\*\*note.*?\)")
_CODE_MARKS = (">>>", "::", "====", "----", "|")

OPENING_WORDS = 4
"""No two paragraphs share their first words, this many: prompts of at least as many words cannot coincide."""


def collect_paragraphs(*, docstrings: bool = True) -> list[str]:
    """Paragraphs of prose from `pydoc_data.topics` and, with `docstrings`, from the standard library's source files.

    Each paragraph is one line, starts differently from every other one and is at least `MIN_CHARACTERS` long. Nothing
    is imported but the topics (a module of plain data): the docstrings are parsed from the source.

    Raises:
        ValueError: if this Python comes without both (a stripped-down installation).
    """
    texts: list[str] = list(_topics())
    if docstrings:
        texts += _docstrings(Path(sysconfig.get_paths()["stdlib"]))
    paragraphs = _distinct_openings(_prose(texts))
    if not paragraphs:
        raise ValueError(
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


def _docstrings(root: Path) -> Iterator[str]:
    """Every docstring below `root` in the order of the files' names, without importing anything."""
    for path in sorted(root.rglob("*.py")):
        if _EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings_of(path)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:  # tokenize.open obeys the coding comment
            warnings.simplefilter("ignore")  # old escape sequences
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError):  # templates and the like that are no Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


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
