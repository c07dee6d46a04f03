"""Tell control tokens that a template writes from those that a text spells, and encode both as what they are."""

import json
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models

from tealightning.errors import UserError

Text = str | list[str]
"""A whole text, in which control tokens count; or its pieces: they count within a piece, and none forms across two."""

# Code points that Unicode keeps free of characters, then those for private use: a template leaves them where they are.
_MARKS = [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)]


class TextEncoder:
    """Encodes texts of which some parts must not become control tokens, whatever they spell.

    Control tokens are those that the tokenizer calls special, and `turn_tokens`. Other added tokens, such as
    `<think>`, are what a text may spell. A text without a control token is encoded by the tokenizer as it is. For the
    others a copy of the tokenizer knows its control tokens by names that no text has, under which stand those of the
    template, while what a text spells is text. A tokenizer in Python cannot be copied so: it gets the text in pieces.
    """

    def __init__(self, tokenizer: Any, turn_tokens: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.control = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens) | set(turn_tokens)
        self.control.discard("")
        bounded = {t.content for t in added if t.single_word}
        longest_first = sorted(self.control, key=len, reverse=True)
        found = [rf"(?<!\w){re.escape(t)}(?!\w)" if t in bounded else re.escape(t) for t in longest_first]
        self.pattern = re.compile("|".join(found) or r"(?!)")
        self._length = max(map(len, self.control), default=0)
        # Of a token that forms with the text before or after; a word alone is no sign of one.
        self._beginnings = {t[:k] for t in self.control for k in range(1, len(t)) if not t[:k].isalnum()}
        self._ends = {t[k:] for t in self.control for k in range(1, len(t)) if not t[k:].isalnum()}
        self._firsts, self._lasts = {t[0] for t in self.control}, {t[-1] for t in self.control}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normalized = any(t.normalized for t in added if t.content in self.control)
        self._normalize: Callable[[str], str] | None = (
            backend.normalizer.normalize_str if normalized and backend is not None and backend.normalizer else None
        )

    def mark_for(self, texts: Any, others: Any = ()) -> str | None:
        """A character that is nowhere in `texts` and `others`, if `texts` spell (part of) a control token."""
        if not any(self._spells(text) for text in strings_in(texts)):
            return None
        everything = set(chain.from_iterable(strings_in((texts, others))))
        mark = next((chr(m) for m in _MARKS if chr(m) not in everything), None)
        if mark is None:
            raise UserError("a text holds every character that Unicode keeps for private use: it is no text.")
        return mark

    def marked(self, value: Any, mark: str) -> Any:
        """`value` with `mark` around each character of what spells (part of) a control token, in all of its texts."""
        if isinstance(value, str):
            return self._marked(value, mark)
        if isinstance(value, Mapping):
            return {self.marked(key, mark): self.marked(inner, mark) for key, inner in value.items()}
        return [self.marked(inner, mark) for inner in value] if isinstance(value, list | tuple) else value

    def encode(self, texts: Sequence[Text], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text; `special`: with those that the tokenizer puts around a text."""
        whole = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"] if whole else [])
        before, after = self.around if special else ([], [])
        return [next(encoded) if isinstance(t, str) else [*before, *self._encode_pieces(t), *after] for t in texts]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text, by what it does with a token."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            ids = self.tokenizer.build_inputs_with_special_tokens([None])
            at = ids.index(None)
        elif backend.post_processor is None:
            return [], []
        else:
            token = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x", add_special_tokens=False)
            made = backend.post_processor.process(token, None, True)
            ids, at = made.ids, made.special_tokens_mask.index(0)
        return ids[:at], ids[at + 1 :]

    def _spells(self, text: str) -> bool:
        if self.pattern.search(text) or self._halves(text) != (0, 0):
            return True
        return self._normalize is not None and self.pattern.search(self._normalize(text)) is not None

    def _halves(self, text: str) -> tuple[int, int]:
        """How many characters at the start and at the end, apart from white space, are part of a control token that
        may form with what stands before and after."""
        start, end = text.lstrip()[: self._length], text.rstrip()[-self._length :]
        ends = any(c in start for c in self._lasts)
        begins = any(c in end for c in self._firsts)
        return (
            max((k for k in range(1, len(start) + 1) if start[:k] in self._ends), default=0) if ends else 0,
            max((k for k in range(1, len(end) + 1) if end[-k:] in self._beginnings), default=0) if begins else 0,
        )

    def _marked(self, text: str, mark: str) -> str:
        head, tail = self._halves(text)
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        spelled = {i for match in self.pattern.finditer(text) for i in range(*match.span())}
        spelled |= {*range(first, first + head), *range(last - tail, last)}
        return "".join(f"{mark}{c}{mark}" if i in spelled else c for i, c in enumerate(text))

    def _encode_pieces(self, pieces: list[str]) -> list[int]:
        if self._renamed is not None:
            # What is marked comes in pieces of one character.
            named = [self.pattern.subn(self._alias, p) if len(p) > 1 else (p, 0) for p in pieces]
            ids = self._renamed.encode("".join(text for text, _ in named), add_special_tokens=False).ids
            if sum(i in self._control_ids for i in ids) == sum(number for _, number in named):
                return ids
        # Python, or control tokens that count only in some surroundings: spelled ones are encoded letter by letter.
        encoded = self.tokenizer([p for p in pieces if p], add_special_tokens=False, verbose=False)["input_ids"]
        return list(chain.from_iterable(encoded))

    def _alias(self, match: re.Match[str]) -> str:
        return self._aliases[match[0]]

    @cached_property
    def _aliases(self) -> dict[str, str]:
        # Of small letters and digits, which normalizers leave alone.
        return {token: f"q{uuid.uuid4().hex}q" for token in sorted(self.control)}

    @cached_property
    def _control_ids(self) -> set[int]:
        ids = {self.tokenizer.convert_tokens_to_ids(token) for token in self.control}
        return ids - {self.tokenizer.unk_token_id}

    @cached_property
    def _renamed(self) -> Tokenizer | None:
        """The tokenizer with the aliases in place of its control tokens; None = it cannot be had."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        try:
            described = json.loads(backend.to_str())
        except Exception:  # tokenizers has no other class for "a part of it is written in Python"
            return None
        described["truncation"] = described["padding"] = None
        for token in described["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model["vocab"], list):  # Unigram, which takes a piece of text for the control token of that name
            model["vocab"] = [[self._aliases.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {self._aliases.get(piece, piece): i for piece, i in model["vocab"].items()}
            model["unk_token"] = self._aliases.get(model.get("unk_token"), model.get("unk_token"))
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if _merged(m) not in self._aliases]
        renamed = Tokenizer.from_str(json.dumps(described))
        for token, alias in self._aliases.items():
            assert renamed.token_to_id(alias) == backend.token_to_id(token), token
        return renamed


def split_at(text: str, mark: str) -> list[str]:
    """The pieces of a rendered text between marks, in either form that a template may write."""
    return re.split(f"{mark}|{re.escape(json.dumps(mark)[1:-1])}", text)


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
