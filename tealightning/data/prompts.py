"""Prompt sets: checked, encoded once, handed out as batches."""

import itertools
import json
import math
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from pyarrow import compute
from tqdm import tqdm

from tealightning.data.messages import as_prompt, without_nulls
from tealightning.data.sources import Rows, columns_of, is_arrow, numbered, place_of
from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.text.chat import ChatFormatter
from tealightning.types import Prompt, PromptBatch

_ENCODE_CHUNK = 1024
_SHOWN = 5  # bad prompts in a message
# Writes all texts of a row, in C. What JSON does not know, a date or an image, holds none that could not be written.
_WRITER = json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=lambda value: None)


@dataclass(kw_only=True, slots=True)
class PromptSet:
    """The prompts of a split, n of them."""

    rows: Rows  # at least n, as read
    row_numbers: NDArray[np.int64]  # [n] where each prompt is in `rows`
    ids: pyarrow.Array  # n texts, unique; a list of them would take several times the memory
    tokens: NDArray[np.int32]  # all prompts' tokens, one after another
    offsets: NDArray[np.int64]  # [n + 1] where each prompt's tokens begin, and where the last one's end
    prompt_column: str
    template_columns: Sequence[str] = ()  # that the chat template reads

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Iterable[int]) -> PromptBatch:
        """The prompts at `indices` (0 to n - 1)."""
        chosen = [int(i) for i in indices]
        columns = (self.prompt_column, *self.template_columns)
        rows = [_cleared(self.rows, self.rows[int(self.row_numbers[i])], columns) for i in chosen]
        return PromptBatch(
            ids=[self.ids[i].as_py() for i in chosen],
            prompts=[as_prompt(row[self.prompt_column]) for row in rows],
            token_ids=[self.tokens[self.offsets[i] : self.offsets[i + 1]].tolist() for i in chosen],
            metadata=[{key: value for key, value in row.items() if key != self.prompt_column} for row in rows],
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] tokens of each prompt."""
        return np.diff(self.offsets)

    def name_of(self, index: int) -> str:
        """The prompt at `index`, for people: its identifier and where it is in the file."""
        return f"prompt {self.ids[index].as_py()!r} ({place_of(self.rows, int(self.row_numbers[index]))})"

    def prompt_of_token(self, position: int) -> int:
        """The index of the prompt that `tokens[position]` belongs to."""
        return int(np.searchsorted(self.offsets, position, side="right")) - 1


def build_prompt_set(
    rows: Rows,
    *,
    source: str,
    formatter: ChatFormatter,
    prompt_column: str = "prompt",
    id_column: str | None = None,
    system_prompt: str | None = None,
    max_prompt_tokens: int | None = None,
    check_metadata: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> PromptSet:
    """Check and encode `rows` in one pass. `source` names them in messages, each of `check_metadata` refuses other
    columns that it cannot take with a ValueError; for the rest see `PromptDataModule`."""
    columns = columns_of(rows)
    for column in filter(None, (prompt_column, id_column)):
        if column not in columns:
            raise UserError(f"{source}: there is no column {column!r}.{did_you_mean(column, columns)}")
    id_column = id_column or ("id" if "id" in columns else None)
    encode = partial(formatter.encode_prompts, system_prompt=system_prompt)
    template_columns = [column for column in formatter.columns if column in columns]
    checked = _checked(rows, source, prompt_column, id_column, template_columns, check_metadata)
    chunks, number, shortest = [], 0, math.inf
    kept, tokens, offsets = array("q"), array("i"), array("q", [0])
    while chunk := list(itertools.islice(checked, _ENCODE_CHUNK)):
        chunks.append(pyarrow.array([identifier for identifier, *_ in chunk]))
        for token_ids in _encode([row for _, *row in chunk], encode, rows, source, first_row=number):
            shortest = min(shortest, len(token_ids))
            if max_prompt_tokens is None or len(token_ids) <= max_prompt_tokens:
                kept.append(number)
                tokens.extend(token_ids)
                offsets.append(len(tokens))
            number += 1
    ids = pyarrow.chunked_array(chunks).combine_chunks()
    _check_unique(ids, rows, source)
    if not kept:
        raise UserError(
            f"{source}: all {number:,} prompts are longer than max_prompt_tokens={max_prompt_tokens} (the shortest has "
            f"{shortest} tokens)."
        )
    if dropped := number - len(kept):
        warnings.warn(
            f"{source}: dropped {dropped:,} of {number:,} prompts longer than {max_prompt_tokens} tokens.", stacklevel=2
        )
    row_numbers = np.frombuffer(kept, dtype=np.int64)
    return PromptSet(
        rows=rows,
        row_numbers=row_numbers,
        ids=ids.take(row_numbers) if dropped else ids,
        tokens=np.frombuffer(tokens, dtype=np.int32),
        offsets=np.frombuffer(offsets, dtype=np.int64),
        prompt_column=prompt_column,
        template_columns=template_columns,
    )


def _cleared(rows: Rows, row: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """`row` without the nulls that an Arrow table puts into structs, in `columns`; of a JSON file, as it is."""
    return row | {c: without_nulls(row[c]) for c in columns if c in row} if is_arrow(rows) else row


def _checked(
    rows: Rows,
    source: str,
    prompt_column: str,
    id_column: str | None,
    template_columns: Sequence[str],
    check_metadata: Sequence[Callable[[dict[str, Any]], None]],
) -> Iterator[tuple[str, Prompt, dict[str, Any]]]:
    """Identifier, prompt and the columns of the chat template of each row, as far as all prompts are good; the bad ones
    are told of at the end."""
    bad: list[str] = []
    is_quiet = bool(getattr(rank_zero_only, "rank", 0))
    look = {"desc": source, "unit": " prompts", "delay": 5, "leave": False, "disable": is_quiet}
    for number, row in tqdm(numbered(rows, source), total=len(rows), **look):
        try:
            row = _cleared(rows, row, (prompt_column, *template_columns))
            prompt = as_prompt(row.get(prompt_column))
        except ValueError as error:
            bad.append(f"{place_of(rows, number)}: {error}" if len(bad) < _SHOWN else "")
        if not bad:
            try:
                identifier = str(number) if id_column is None else _identifier(row, id_column)
                _check_texts(row | {prompt_column: prompt})
                for check in check_metadata:
                    check({column: value for column, value in row.items() if column != prompt_column})
            except ValueError as error:
                raise UserError(f"{source}: {place_of(rows, number)}: {error}") from error
            yield identifier, prompt, {column: row.get(column) for column in template_columns}
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(
            f"{source}: column {prompt_column!r} must hold non-empty texts or chats. {'; '.join(bad[:_SHOWN])}{more}."
        )


def _identifier(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value != value or not str(value).strip():  # NaN is pandas' way to say missing
        raise UserError(f"it has no identifier in column {column!r}.")
    if isinstance(value, bytes | list | dict):
        raise UserError(f"column {column!r}: an identifier is a text or a number, got {type(value).__name__}.")
    return str(value)


def _check_texts(row: dict[str, Any]) -> None:
    """Refuse a row with a text that no file or server takes, in whichever column: rewards get all of them."""
    if not _is_encoded(row):
        column = next((name for name, value in row.items() if not _is_encoded({name: value})), None)
        raise UserError(f"column {column!r}: it holds half a character (a lone surrogate), or is nested too deeply.")


def _is_encoded(row: dict[str, Any]) -> bool:
    try:
        _WRITER.encode(row).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _encode(
    prompts: list[list[Any]], encode: Callable[..., list[list[int]]], rows: Rows, source: str, *, first_row: int
) -> list[list[int]]:
    """Token ids of each prompt of a chunk, given with its columns for the template; an error names the row."""
    try:
        encoded = encode([prompt for prompt, _ in prompts], metadata=[columns for _, columns in prompts])
    except ValueError:
        for row, (prompt, columns) in enumerate(prompts, start=first_row):  # which one?
            try:
                encode([prompt], metadata=[columns])
            except ValueError as error:
                raise UserError(f"{source}: {place_of(rows, row)}: {error}") from error
        raise
    if [] in encoded:
        raise UserError(f"{source}: the prompt of {place_of(rows, first_row + encoded.index([]))} has no tokens.")
    return encoded


def _check_unique(ids: pyarrow.Array, rows: Rows, source: str) -> None:
    order = compute.array_sort_indices(ids)  # takes less memory than a set of the texts
    texts = ids.take(order)
    same = compute.index(compute.equal(texts[1:], texts[:-1]), True).as_py()
    if same >= 0:
        first, again = (place_of(rows, row) for row in sorted(order[same : same + 2].to_pylist()))
        raise UserError(
            f"{source}: identifiers must be unique, and {texts[same].as_py()!r} is that of {first} and of {again}. "
            "Name another column with id_column, or remove the duplicates."
        )
