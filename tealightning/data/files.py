"""Read files of rows, JSON lines, JSON, CSV, TSV or Parquet, plain or compressed; errors say where in the file."""

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tealightning.errors import UserError

Rows = Sequence[dict[str, Any]]

_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20
_ARROW_ROWS = 1000  # that are made Python objects together


def read_file(path: Path) -> Rows:
    """The rows of an existing file, by its format; JSON lines stay on the disk, everything else is kept in memory."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file.")
    try:
        return READERS[format_of(path)](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply.") from error


def format_of(path: Path) -> str:
    """`.jsonl` of `Prompts.JSONL.gz`: the extension in small letters, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() in _PACKED_SUFFIXES else path).suffix.lower()


# ---------------------------------------------------------------- compression


def _unpacked_zstd(packed: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(packed, "zstd")


_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_UNPACK: dict[bytes, Callable[[BinaryIO], Any]] = {  # by the first bytes of a file
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9][1\x17]": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"\x28\xb5\x2f\xfd": _unpacked_zstd,
}
_NO_TEXT = {  # first bytes of what is taken for a text by mistake
    b"PK": "It is a zip archive: unpack it.",
    b"PAR1": "It is a Parquet file: name it .parquet.",
    b"\xff\xfe": "It is UTF-16: convert it (iconv -f UTF-16 -t UTF-8).",
    b"\xfe\xff": "It is UTF-16: convert it (iconv -f UTF-16 -t UTF-8).",
}


def _opened(path: Path) -> BinaryIO:
    """A file for reading anywhere in it; a compressed one is unpacked first, into a temporary file without a name."""
    file: BinaryIO = path.open("rb")
    start = file.read(8)
    file.seek(0)
    for magic, unpack in _UNPACK.items():
        if re.match(magic, start):
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (returned)
            try:
                with file, unpack(file) as content:
                    shutil.copyfileobj(content, unpacked, _BLOCK)
                unpacked.seek(0)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"{path} cannot be unpacked into {tempfile.gettempdir()} ($TMPDIR): {error}") from error
            return unpacked
    return file


class OpenFile:
    """A file that is held open. Copies share it, and a pickled one opens its path again, for instance in a process
    that was spawned: what changed in between is for its reader to notice."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.lines = _opened(path)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; safe in threads, as the file has no position that is moved."""
        return os.pread(self.lines.fileno(), end - start, start)

    def __reduce__(self) -> Any:
        return OpenFile, (self.path,)

    def __copy__(self) -> "OpenFile":
        return self

    def __deepcopy__(self, memo: Any) -> "OpenFile":
        return self


# ---------------------------------------------------------------- JSON


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file, one a line: each is checked once, and read again when it is asked for. Empty lines are
    left out. Twelve bytes a row are kept in memory.

    The file is held open, so that replacing it changes nothing; what is changed inside it is noticed. It is UTF-8, with
    or without a byte-order mark; lines end in LF or CRLF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = OpenFile(path)
        self._starts = array("q")  # n + 1: where each line begins, and where the last one ends
        self._checksums = array("L")  # n
        columns: dict[str, None] = {}
        end = 0
        for number, line in enumerate(self._file.lines, start=1):
            end += len(line)
            content = line.removeprefix(_BOM) if number == 1 else line
            if content.strip():
                columns.update(dict.fromkeys(_decoded(content, f"{self.path}, line {number}")))
                self._starts.append(end - len(content))
                self._checksums.append(zlib.crc32(content))
        self._starts.append(end)
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self._checksums)

    def __getitem__(self, index: Any) -> Any:
        row = range(len(self))[index]
        content = self._file.read(self._starts[row], self._starts[row + 1])
        line = content[: content.find(b"\n") + 1] or content  # without the empty lines before the next row
        if zlib.crc32(line) != self._checksums[row]:
            raise UserError(f"{self.path}, {self.place(row)} was changed while the file was in use.")
        return json.loads(line)

    def select(self, rows: range) -> "JsonLines":
        """Some neighbouring rows."""
        part = copy.copy(self)
        part._starts = self._starts[rows.start : rows.stop + 1]
        part._checksums = self._checksums[rows.start : rows.stop]
        return part

    def place(self, row: int) -> str:
        """Where a row is, for people: `line 17`."""
        number, start = 1, self._starts[row]
        for offset in range(0, start, _BLOCK):
            number += self._file.read(offset, min(start, offset + _BLOCK)).count(b"\n")
        return f"line {number}"


def _decoded(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = _hint(line)
        raise UserError(
            f"{place} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}: {error.reason}.{hint}"
        ) from None
    except json.JSONDecodeError as error:
        hint = " Is it a list of objects (.json)?" if line.strip() in (b"[", b"[{") else _hint(line)
        raise UserError(f"{place} is not JSON: {error.msg}.{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{place} cannot be read: {error}.") from None
    if not isinstance(row, dict):
        hint = " Is it a list of objects (.json)?" if isinstance(row, list) else ""
        raise UserError(f"{place}: expected an object, {{...}}, got {type(row).__name__}.{hint}")
    return row


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    try:
        rows = _JSON.decode(text or "[]")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON: {error.msg} ({where}). Is it JSON lines (.jsonl)?") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, [{{...}}, ...], got {type(rows).__name__}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            got = f"row {number} (from 0) is {type(row).__name__}"
            raise UserError(f"{path}: expected a list of objects, [{{...}}, ...]; {got}.")
    return rows


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {_repeated(key for key, _ in pairs)} comes twice in an object")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _repeated(names: Iterable[str]) -> str:
    """The names that come more than once, for people; nothing if there are none."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


# ---------------------------------------------------------------- text


def _text(path: Path) -> str:
    with _opened(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text: {error}.{_hint(content)}") from None


def _hint(content: bytes) -> str:
    return "".join(f" {hint}" for magic, hint in _NO_TEXT.items() if content.startswith(magic))


def _read_csv(path: Path, dialect: str = "excel") -> list[dict[str, Any]]:
    lines = io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="")
    reader = csv.reader(lines, dialect, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process; by default a cell has 131,072 characters at most
    first_line, rows = 1, []
    try:
        header = next(filter(None, reader), [])
        _check_columns(header, path)
        first_line = reader.line_num + 1
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise UserError(
                    f"{path}, line {first_line}: expected the header's {len(header)} fields, got {len(fields)}."
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} is not CSV, in the row that begins in line {first_line}: {error}.") from error
    except UnicodeDecodeError:
        _text(path)  # which knows the line
        raise
    finally:
        csv.field_size_limit(limit)
        lines.close()
    return rows


def _check_columns(names: list[str], path: Path) -> None:
    if any("\0" in name for name in names):
        raise UserError(f"{path}: there are NUL characters in the names of columns. Is it UTF-16? It must be UTF-8.")
    if repeated := _repeated(names):
        raise UserError(f"{path}: several columns have the same name: {repeated}. Rename all but one.")


# ---------------------------------------------------------------- Parquet


class ArrowRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table, in memory. A map arrives as a dictionary, a category as its text, and every other
    value as what pyarrow makes of it in Python."""

    def __init__(self, table: Any, path: Path) -> None:
        self.table = table
        self.path = path
        self.column_names: list[str] = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self._rows(range(len(self))[index], 1)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _ARROW_ROWS):
            yield from self._rows(start, _ARROW_ROWS)

    def __deepcopy__(self, memo: Any) -> "ArrowRows":
        return self  # tables never change

    def select(self, rows: range) -> "ArrowRows":
        """Some neighbouring rows."""
        return ArrowRows(self.table.slice(rows.start, len(rows)), self.path)

    def _rows(self, start: int, count: int) -> list[dict[str, Any]]:
        try:
            return self.table.slice(start, count).to_pylist(maps_as_pydicts="strict")
        except Exception as error:  # a text that is no UTF-8, a date in the year 300,000: of no common class
            for row in range(start, min(start + count, len(self))):
                for column in self.column_names:
                    try:
                        self.table.column(column).slice(row, 1).to_pylist(maps_as_pydicts="strict")
                    except Exception as reason:
                        place = f"{self.path}, row {row} (from 0), column {column!r}"
                        raise UserError(f"{place} cannot be read: {reason}") from error
            raise


def _read_parquet(path: Path) -> ArrowRows:
    import pyarrow.parquet

    with _opened(path) as content:
        try:
            file = pyarrow.parquet.ParquetFile(content)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from error
        names = file.schema_arrow.names
        _check_columns(names, path)
        try:
            return ArrowRows(file.read(), path)
        except (pyarrow.ArrowException, OSError) as error:
            for name in names:
                try:
                    file.read(columns=[name])
                except (pyarrow.ArrowException, OSError) as reason:
                    raise UserError(f"{path}, column {name!r} cannot be read: {reason}") from error
            raise UserError(f"{path} cannot be read: {error}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, dialect="excel-tab"),
    ".parquet": _read_parquet,
}
