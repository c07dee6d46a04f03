"""Prompt sets: checked, encoded once, handed out as batches."""

import math
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from tqdm import tqdm

from tealightning.data.sources import Rows, columns_of, place_of
from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.text.chat import ChatFormatter
from tealightning.types import Message, Prompt, PromptBatch

_ENCODE_CHUNK = 1024
_SHOWN = 5  # bad prompts in a message


class StringArray(Sequence[str]):
    """Texts in an Arrow array: their bytes and eight for each, where a list of them takes 60 or more."""

    def __init__(self, array: pyarrow.LargeBinaryArray) -> None:
        self.array = array

    @classmethod
    def of(cls, texts: Iterable[str]) -> "StringArray":
        """Pack texts as they come."""
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(data)]
        return cls(pyarrow.LargeBinaryArray.from_buffers(pyarrow.large_binary(), len(ends) - 1, buffers))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.array[int(index)].as_py().decode("utf-8", "surrogatepass")

    def first_repeated(self) -> tuple[int, int] | None:
        """The rows of the first text that was there before; None if all differ."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        first: dict[str, int] = {}
        for row in np.sort(np.concatenate([order[same], order[same + 1]])).tolist():  # few, unless many are repeated
            if (earlier := first.setdefault(self[row], row)) != row:
                return earlier, row
        return None


@dataclass(kw_only=True, slots=True)
class PromptSet:
    """The prompts of a split, n of them."""

    rows: Rows  # at least n, as read
    row_numbers: NDArray[np.int64]  # [n] where each prompt is in `rows`
    ids: Sequence[str]  # n, unique
    tokens: NDArray[np.int32]  # all prompts' tokens, one after another
    ends: NDArray[np.int64]  # [n] where each prompt's tokens end
    prompt_column: str

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Iterable[int]) -> PromptBatch:
        """The prompts at `indices` (0 to n - 1)."""
        chosen = [int(i) for i in indices]
        rows = [self.rows[int(self.row_numbers[i])] for i in chosen]
        return PromptBatch(
            ids=[self.ids[i] for i in chosen],
            prompts=[as_prompt(row[self.prompt_column]) for row in rows],
            token_ids=[self._tokens_of(i) for i in chosen],
            metadata=[{key: value for key, value in row.items() if key != self.prompt_column} for row in rows],
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] tokens of each prompt."""
        return np.diff(self.ends, prepend=0)

    def name_of(self, index: int) -> str:
        """The prompt at `index`, for people: its identifier and where it is in the file."""
        return f"prompt {self.ids[index]!r} ({place_of(self.rows, int(self.row_numbers[index]))})"

    def prompt_of_token(self, position: int) -> int:
        """The index of the prompt that `tokens[position]` belongs to."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def _tokens_of(self, index: int) -> list[int]:
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]].tolist()


def build_prompt_set(
    rows: Rows,
    *,
    source: str,
    formatter: ChatFormatter,
    prompt_column: str = "prompt",
    id_column: str | None = None,
    system_prompt: str | None = None,
    max_prompt_tokens: int | None = None,
) -> PromptSet:
    """Check and encode `rows`.

    Args:
        source: Origin of the rows, for messages.
        id_column: None = `id` if there is such a column, else the row's number, from 0.
        max_prompt_tokens: Drop longer prompts, with a warning that counts them.

    Raises:
        ValueError: for a column that does not exist, bad prompts (with their rows), duplicate identifiers, or when
            every prompt is too long.
    """
    columns = columns_of(rows)
    for column in filter(None, (prompt_column, id_column)):
        if column not in columns:
            raise UserError(f"{source}: there is no column {column!r}.{did_you_mean(column, columns)}")
    id_column = id_column or ("id" if "id" in columns else None)
    encoder = _Encoder(rows, source, formatter, system_prompt, max_prompt_tokens)
    ids = _read(rows, encoder, source=source, prompt_column=prompt_column, id_column=id_column)
    row_numbers = np.frombuffer(encoder.row_numbers, dtype=np.int64)
    encoder.report_dropped(len(rows))
    return PromptSet(
        rows=rows,
        row_numbers=row_numbers,
        ids=ids if len(row_numbers) == len(rows) else StringArray(ids.array.take(row_numbers)),
        tokens=np.frombuffer(encoder.tokens, dtype=np.int32),
        ends=np.frombuffer(encoder.ends, dtype=np.int64),
        prompt_column=prompt_column,
    )


def as_prompt(value: Any) -> Prompt:
    """`value` as a prompt: a text, or a chat whose messages have exactly `role` and `content`.

    Raises:
        ValueError: for anything else, with what is wrong.
    """
    if isinstance(value, str):
        if not value:
            raise UserError("it is empty")
        _check_text(value)
        return value
    if not isinstance(value, list):
        raise UserError(f"it is {'missing' if value is None else type(value).__name__}")
    chat = [_as_message(message) for message in value]
    if not chat:
        raise UserError("it is empty")
    if chat[-1]["role"] == "assistant":
        raise UserError("its last message is the assistant's, which is what the policy is to write")
    return chat


def _as_message(message: Any) -> Message:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise UserError('its messages are not all {"role": "...", "content": "..."}')
    _check_text(message["content"])
    return {"role": message["role"], "content": message["content"]}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character: "\\ud83d"
        raise UserError(f"it holds half a character (a lone surrogate) at {error.start}") from None


def _read(rows: Rows, encoder: "_Encoder", *, source: str, prompt_column: str, id_column: str | None) -> StringArray:
    """Check and encode every row in one pass, and return the identifiers."""
    ids = StringArray.of(_identifiers(rows, encoder, source, prompt_column, id_column))
    if (repeated := ids.first_repeated() if id_column is not None else None) is not None:
        first, again = (place_of(rows, row) for row in repeated)
        raise UserError(
            f"{source}: identifiers must be unique, and {ids[repeated[0]]!r} is that of {first} and of {again}. Name "
            "another column with id_column, or remove the duplicates."
        )
    return ids


def _identifiers(
    rows: Rows, encoder: "_Encoder", source: str, prompt_column: str, id_column: str | None
) -> Iterator[str]:
    """The identifier of each row, whose prompt is checked and encoded."""
    bad: list[str] = []
    is_quiet = bool(getattr(rank_zero_only, "rank", 0))
    for number, row in enumerate(tqdm(rows, desc=source, unit=" prompts", delay=5, leave=False, disable=is_quiet)):
        yield _identifier(row, number, rows, source=source, column=id_column)
        try:
            prompt = as_prompt(row.get(prompt_column))
        except ValueError as error:
            bad.append(f"{place_of(rows, number)}: {error}" if len(bad) < _SHOWN else "")
        if not bad:
            encoder.add(prompt)
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(
            f"{source}: column {prompt_column!r} must hold non-empty texts or chats. {'; '.join(bad[:_SHOWN])}{more}."
        )
    encoder.flush()


def _identifier(row: dict[str, Any], number: int, rows: Rows, *, source: str, column: str | None) -> str:
    if column is None:
        return str(number)
    if row.get(column) is None:
        raise UserError(f"{source}: {place_of(rows, number)} has no identifier in column {column!r}.")
    return str(row[column])


class _Encoder:
    """Encodes prompts as they come, a chunk at a time, and keeps the tokens of those that are short enough."""

    def __init__(
        self, rows: Rows, source: str, formatter: ChatFormatter, system_prompt: str | None, limit: int | None
    ) -> None:
        self.rows = rows
        self.source = source
        self.formatter = formatter
        self.system_prompt = system_prompt
        self.limit = limit
        self.row_numbers = array("q")  # of the prompts that are short enough
        self.tokens = array("i")
        self.ends = array("q")
        self.shortest: float = math.inf
        self._chunk: list[Prompt] = []
        self._encoded = 0

    def add(self, prompt: Prompt) -> None:
        """Encode the next row's prompt, now or with later ones."""
        self._chunk.append(prompt)
        if len(self._chunk) == _ENCODE_CHUNK:
            self.flush()

    def flush(self) -> None:
        """Encode what was added.

        Raises:
            ValueError: for a prompt that the template refuses or that has no tokens, with its row.
        """
        for number, token_ids in enumerate(self._encode(self._chunk), start=self._encoded):
            if not token_ids:
                raise UserError(f"{self.source}: the prompt of {place_of(self.rows, number)} has no tokens.")
            self.shortest = min(self.shortest, len(token_ids))
            if self.limit is None or len(token_ids) <= self.limit:
                self.row_numbers.append(number)
                self.tokens.extend(token_ids)
                self.ends.append(len(self.tokens))
        self._encoded += len(self._chunk)
        self._chunk.clear()

    def report_dropped(self, count: int) -> None:
        """Warn of the prompts among `count` that were too long.

        Raises:
            ValueError: if all were.
        """
        dropped = count - len(self.row_numbers)
        if dropped == count:
            raise UserError(
                f"{self.source}: all {dropped:,} prompts are longer than max_prompt_tokens={self.limit} (the shortest "
                f"has {self.shortest} tokens)."
            )
        if dropped:
            warnings.warn(
                f"{self.source}: dropped {dropped:,} of {count:,} prompts longer than {self.limit} tokens.",
                stacklevel=2,
            )

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        try:
            return self.formatter.encode_prompts(prompts, system_prompt=self.system_prompt)
        except ValueError:
            for number, prompt in enumerate(prompts, start=self._encoded):  # which one?
                try:
                    self.formatter.encode_prompts([prompt], system_prompt=self.system_prompt)
                except ValueError as error:
                    raise UserError(f"{self.source}: {place_of(self.rows, number)}: {error}") from error
            raise
