"""Prompts in memory: checked, encoded once, handed out as batches."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tealightning.data.sources import Rows, columns_of
from tealightning.registry import did_you_mean
from tealightning.rewards.chat import ChatFormatter
from tealightning.types import Message, Prompt, PromptBatch

_ENCODE_CHUNK = 1024


@dataclass(kw_only=True, slots=True)
class PromptSet:
    """The prompts of a split, n of them."""

    rows: Rows  # at least n, as read
    row_numbers: NDArray[np.int64]  # [n] where each prompt is in `rows`
    ids: list[str]  # n, unique
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
        source: What the rows were read from, for messages.
        id_column: None = `id` if there is such a column, else the row's number, from 0.
        max_prompt_tokens: Drop longer prompts, with a warning that counts them.

    Raises:
        ValueError: for a column that does not exist, bad prompts (with their rows), duplicate identifiers, or when
            every prompt is too long.
    """
    columns = columns_of(rows)
    if prompt_column not in columns:
        raise ValueError(f"{source}: there is no column {prompt_column!r}.{did_you_mean(prompt_column, columns)}")
    ids = _read_ids(rows, source=source, columns=columns, id_column=id_column)
    prompts = _read_prompts(rows, source=source, column=prompt_column)
    try:
        encoded = list(_encode(prompts, formatter, system_prompt))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    lengths = np.array([len(row) for row in encoded])
    kept = _short_enough(lengths, source=source, limit=max_prompt_tokens)
    return PromptSet(
        rows=rows,
        row_numbers=kept,
        ids=[ids[i] for i in kept],
        tokens=np.concatenate([encoded[i] for i in kept]),
        ends=np.cumsum(lengths[kept]),
        prompt_column=prompt_column,
    )


def as_prompt(value: Any) -> Prompt:
    """`value` as a prompt: a text, or a chat whose messages have exactly `role` and `content`.

    Raises:
        ValueError: for anything else, with what is wrong.
    """
    if isinstance(value, str):
        if not value:
            raise ValueError("it is empty")
        return value
    if not isinstance(value, list):
        raise ValueError(f"it is {'missing' if value is None else type(value).__name__}")
    chat = [_as_message(message) for message in value]
    if not chat:
        raise ValueError("it is empty")
    if chat[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's, which is what the policy is to write")
    return chat


def _as_message(message: Any) -> Message:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ValueError('its messages are not all {"role": "...", "content": "..."}')
    return {"role": message["role"], "content": message["content"]}


def _read_prompts(rows: Rows, *, source: str, column: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    bad: list[str] = []
    for number, row in enumerate(rows):
        try:
            prompts.append(as_prompt(row.get(column)))
        except ValueError as error:
            bad.append(f"row {number} ({error})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{source}: column {column!r} must hold non-empty texts or chats; counted from 0, "
            f"{', '.join(bad[:5])}{more} is neither."
        )
    return prompts


def _read_ids(rows: Rows, *, source: str, columns: Sequence[str], id_column: str | None) -> list[str]:
    if id_column is None and "id" not in columns:
        return [str(number) for number in range(len(rows))]
    column = id_column or "id"
    if column not in columns:
        raise ValueError(f"{source}: there is no column {column!r}.{did_you_mean(column, columns)}")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        value = row.get(column)
        if value is None:
            raise ValueError(f"{source}: row {number} (from 0) has no identifier in column {column!r}.")
        first = seen.setdefault(str(value), number)
        if first != number:
            raise ValueError(
                f"{source}: identifiers must be unique, and {str(value)!r} is that of rows {first} and {number} "
                "(from 0). Name another column with id_column, or remove the duplicates."
            )
    return list(seen)


def _encode(
    prompts: Sequence[Prompt], formatter: ChatFormatter, system_prompt: str | None
) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(prompts), _ENCODE_CHUNK):
        chunk = prompts[start : start + _ENCODE_CHUNK]
        for number, row in enumerate(formatter.encode_prompts(chunk, system_prompt=system_prompt), start=start):
            if not row:
                raise ValueError(f"the prompt of row {number} (from 0) has no tokens.")
            yield np.array(row, dtype=np.int32)


def _short_enough(lengths: NDArray[np.int64], *, source: str, limit: int | None) -> NDArray[np.int64]:
    """[n] rows with at most `limit` tokens."""
    kept = np.arange(len(lengths)) if limit is None else np.flatnonzero(lengths <= limit)
    dropped = len(lengths) - len(kept)
    if dropped == len(lengths):
        raise ValueError(
            f"{source}: all {dropped:,} prompts are longer than max_prompt_tokens={limit} (the shortest has "
            f"{lengths.min()} tokens)."
        )
    if dropped:
        warnings.warn(
            f"{source}: dropped {dropped:,} of {len(lengths):,} prompts longer than {limit} tokens.", stacklevel=2
        )
    return kept
