"""Read JSON-lines rows from disk on demand: each is checked once, and decoded again when asked for."""

import json
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

from tealightning.errors import UserError

_BOM = b"\xef\xbb\xbf"


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file, one a line; empty lines are left out. Twelve bytes a row are kept in memory.

    The file is held open, so that replacing it changes nothing; what is changed inside it is noticed.

    Args:
        path: Of the file, in UTF-8 with or without a byte-order mark; lines end in LF or CRLF.

    Raises:
        ValueError: for a line that is no JSON object in UTF-8, with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.column_names: list[str] = []
        self._file = path.open("rb")
        self._starts = array("q")  # n + 1: where each line begins, and where the last one ends
        self._checksums = array("L")  # n
        self._scan()

    def _scan(self) -> None:
        columns: dict[str, None] = {}
        end = 0
        for number, line in enumerate(self._file, start=1):
            end += len(line)
            content = line.removeprefix(_BOM) if number == 1 else line
            if not content.strip():
                continue
            columns.update(dict.fromkeys(_decoded(content, f"{self.path}, line {number}")))
            self._starts.append(end - len(content))
            self._checksums.append(zlib.crc32(content))
        self._starts.append(end)
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self._checksums)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Any:
        """A row, or some neighbouring rows.

        Raises:
            ValueError: if the file was changed since it was opened.
        """
        if isinstance(index, slice):
            return self._neighbours(range(len(self))[index])
        row = range(len(self))[index]
        start, end = self._starts[row], self._starts[row + 1]
        content = os.pread(self._file.fileno(), end - start, start)
        line = content[: content.find(b"\n") + 1] or content  # without the empty lines before the next row
        if zlib.crc32(line) != self._checksums[row]:
            raise UserError(f"{self.path}, {self.place(row)} was changed while the file was in use.")
        return json.loads(line)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def place(self, row: int) -> str:
        """Where a row is, for people: `line 17`."""
        before, left = 0, self._starts[row]
        offset = 0
        while left > 0 and (block := os.pread(self._file.fileno(), min(left, 2**20), offset)):
            before, left, offset = before + block.count(b"\n"), left - len(block), offset + len(block)
        return f"line {before + 1}"

    def _neighbours(self, rows: range) -> Self:
        assert rows.step == 1, "rows stay in the order of the file"
        part = object.__new__(type(self))
        part.path, part.column_names, part._file = self.path, self.column_names, self._file
        stop = max(rows.start, rows.stop)
        part._starts, part._checksums = self._starts[rows.start : stop + 1], self._checksums[rows.start : stop]
        return part


def _decoded(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}: {error.reason}."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{place} cannot be read: {error}.") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, {{...}}, got {type(row).__name__}.")
    return row
