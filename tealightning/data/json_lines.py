"""JSON lines on disk: each row is checked once, and read again when it is asked for."""

import json
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tealightning.errors import UserError

_BOM = b"\xef\xbb\xbf"


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file, one a line; empty lines are left out. Twelve bytes a row are kept in memory.

    The file is held open, so that replacing it changes nothing; what is changed inside it is noticed.

    Args:
        path: Path of the file, in UTF-8 with or without a byte-order mark; lines end in LF or CRLF.

    Raises:
        ValueError: for a line that is no JSON object in UTF-8, with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._starts = array("q")  # n + 1: where each line begins, and where the last one ends
        self._checksums = array("L")  # n
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

    def __getitem__(self, index: Any) -> Any:
        """A row, or some neighbouring rows.

        Raises:
            ValueError: if the file was changed since it was opened.
        """
        if isinstance(index, slice):
            return self._slice(range(len(self))[index])
        row = range(len(self))[index]
        start, end = self._starts[row], self._starts[row + 1]
        content = os.pread(self._file.fileno(), end - start, start)
        line = content[: content.find(b"\n") + 1] or content  # without the empty lines before the next row
        if zlib.crc32(line) != self._checksums[row]:
            raise UserError(f"{self.path}, {self.place(row)} was changed while the file was in use.")
        return json.loads(line)

    def place(self, row: int) -> str:
        """Where a row is, for people: `line 17`."""
        number, start = 1, self._starts[row]
        for offset in range(0, start, 2**20):
            number += os.pread(self._file.fileno(), min(start - offset, 2**20), offset).count(b"\n")
        return f"line {number}"

    def _slice(self, rows: range) -> Self:
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
