"""Read the rows of a prompt data set: a file, or a data set of the Hugging Face hub."""

import copy
import csv
import difflib
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tealightning.errors import MissingFileError, UserError

Rows = Sequence[dict[str, Any]]

_FORM = re.compile(r"(?P<name>[^@:]+)(:(?P<config>[^@:]+))?(@(?P<split>[\w.-]*)(?P<slice>\[[^\]]*\])?)?")
_BOM = b"\xef\xbb\xbf"


@dataclass(kw_only=True, slots=True)
class Source:
    """`name[:config][@split][[from:to]]`, taken apart."""

    text: str  # as the user wrote it
    name: str  # path or hub id
    config: str | None = None
    split: str | None = None
    slice: str = ""  # "[:100]", "[90%:]"

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def is_file(self) -> bool:
        """True: a data file, by its extension or because it is there. False: a folder or hub id."""
        return self.path.suffix.lower() in READERS or self.path.is_file()


def parse_source(text: str) -> Source:
    """Take `prompts.jsonl`, `prompts.jsonl@[:90%]`, `org/name`, `org/name:config@train[:1000]` apart."""
    if Path(text).expanduser().is_file():
        return Source(text=text, name=text)
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserError(
            f"a data source is a file (prompts.jsonl, prompts.jsonl@[:90%]) or a data set of the hub "
            f"(org/name, org/name:config@train[:1000]), got {text!r}."
        )
    source = Source(
        text=text, name=match["name"], config=match["config"], split=match["split"] or None, slice=match["slice"] or ""
    )
    if source.is_file and (source.config or source.split):
        raise UserError(f"{text!r}: a file has no configurations and splits; only a slice, {source.name}@[:1000].")
    return source


def check_source(text: str) -> None:
    """Refuse a source that cannot be read, as far as its name tells; a data set of the hub is looked up later."""
    source = parse_source(text)
    if source.is_file:
        _reader_of(source.path)
    elif (source.path.is_absolute() or text.startswith(".")) and not source.path.exists():
        raise MissingFileError(f"There is no file or folder {source.path.absolute()}.")


def read_rows(text: str) -> Rows:
    """The rows that a source names, in their order; an error if there are none.

    JSON and CSV are read by Python, so that every value is what the file says (in CSV a string); Parquet and hub data
    are Arrow tables. JSON lines stay on the disk, a list of JSON and CSV are kept in memory.
    """
    source = parse_source(text)
    rows = _read_file(source) if source.is_file else _read_data_set(source)
    if len(rows) == 0:
        raise UserError(f"{text!r} has no rows.")
    return rows


def columns_of(rows: Rows) -> list[str]:
    """Every column of `rows`, in order of appearance."""
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    return list(dict.fromkeys(key for row in rows for key in row))


def place_of(rows: Rows, row: int) -> str:
    """Where a row is, for people: `line 17` of JSON lines, else `row 16 (from 0)`."""
    return rows.place(row) if isinstance(rows, JsonLines) else f"row {row} (from 0)"


class OpenFile:
    """A file that is held open. Copies share it, and a pickled one opens its path again, for instance in a process
    that was spawned: what changed in between is for its reader to notice."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.lines = path.open("rb")

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; safe in threads, as the file has no position that is moved."""
        return os.pread(self.lines.fileno(), end - start, start)

    def __reduce__(self) -> Any:
        return OpenFile, (self.path,)

    def __copy__(self) -> "OpenFile":
        return self

    def __deepcopy__(self, memo: Any) -> "OpenFile":
        return self


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
        start, end = self._starts[row], self._starts[row + 1]
        content = self._file.read(start, end)
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
        for offset in range(0, start, 2**20):
            number += self._file.read(offset, min(start, offset + 2**20)).count(b"\n")
        return f"line {number}"


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


def _read_file(source: Source) -> Rows:
    path = source.path
    reader = _reader_of(path)
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply.") from error
    if not source.slice:
        return rows
    from datasets import ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(f"all{source.slice}").to_absolute({"all": len(rows)})
    except (ValueError, AssertionError) as error:
        hint = "Say [:1000], [90%:], [10:20]."
        raise UserError(f"{source.text!r}: {source.slice} is no slice: {error}. {hint}") from error
    chosen = range(part.from_, max(part.from_, part.to))
    return rows[chosen.start : chosen.stop] if isinstance(rows, list) else rows.select(chosen)


def _reader_of(path: Path) -> Callable[[Path], Any]:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise MissingFileError(f"There is no file {path.absolute()}.{hint}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot tell the format from {path.suffix!r}. Known: {', '.join(READERS)}.")
    return reader


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON: {error.msg} ({where}). Is it JSON lines (.jsonl)?") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects, [{{...}}, ...].")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            rows = []
            for row in reader:
                if None in row or None in row.values():  # more, or fewer, fields than the header
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected the header's {len(reader.fieldnames or [])} fields."
                    )
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{path} is not CSV, in or after line {reader.line_num}: {error}.") from error
    return rows


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


def _read_data_set(source: Source) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source.name, source.config, split=f"{source.split or 'train'}{source.slice}")
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{source.text!r} is neither a file (nothing is at {source.path.absolute()}) nor a data set that can be "
            f"loaded from the hub: {error}"
        ) from error


READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": JsonLines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
