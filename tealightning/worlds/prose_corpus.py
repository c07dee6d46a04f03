"""English prose that every Python installation carries: its language reference, docstrings and comments."""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from tealightning.errors import UserError

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
            with tokenize.open(path) as file:  # obeys the coding comment
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
