"""Read the rows of a prompt data set: a file, or a data set of the Hugging Face hub."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tealightning.checks import check_text
from tealightning.data.files import READERS, ArrowRows, JsonLines, Rows, format_of, read_file
from tealightning.errors import MissingFileError, UserError

_FORM = re.compile(r"(?P<name>[^@:\[]+)(:(?P<config>[^@:\[]+))?(@(?P<split>[\w.-]*)(?P<slice>\[[^\]]*\])?)?")
_READINGS = (  # of names that may hold @ and :, the most literal one first
    re.compile(r"(?P<name>.+)(?P<config>)(?P<split>)(?P<slice>)", re.DOTALL),
    re.compile(r"(?P<name>.+)(?P<config>)@(?P<split>[\w.-]*)(?P<slice>\[[^\]]*\])?", re.DOTALL),
    re.compile(r"(?P<name>.+):(?P<config>[^@:]+)(@(?P<split>[\w.-]*)(?P<slice>\[[^\]]*\])?)?", re.DOTALL),
)


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
        if self.name.startswith("file://"):
            return Path(unquote(self.name.removeprefix("file://").removeprefix("localhost")))
        return Path(os.path.expanduser(self.name))  # which leaves an unknown user's ~name as it is

    @property
    def exists(self) -> bool:
        return os.path.exists(self.path)  # Path.exists raises on a name that is too long

    @property
    def is_file(self) -> bool:
        """True: a data file, by its extension or because it is there. False: a folder or hub id."""
        return not os.path.isdir(self.path) and (format_of(self.path) in READERS or self.exists)


def parse_source(text: str) -> Source:
    """Take `prompts.jsonl`, `prompts.jsonl@[:90%]`, `org/name`, `org/name:config@train[:1000]` apart.

    What is there, or is named like a data file, is that file or folder, whatever `@` and `:` its name holds.
    """
    text = check_text("a data source", os.fspath(text))
    readings = [_source(text, match) for form in _READINGS if (match := form.fullmatch(text))]
    paths = [r for r in readings if r.exists] or [r for r in readings if format_of(r.path) in READERS]
    match = _FORM.fullmatch(text)
    if re.match(r"[a-zA-Z][\w+.-]*://", text) and not text.startswith("file://"):
        raise UserError(f"{text!r} is an address of the network: download the file, or name a data set of the hub.")
    if not paths and match is None:
        raise UserError(
            f"a data source is a file (prompts.jsonl, prompts.jsonl@[:90%]) or a data set of the hub "
            f"(org/name, org/name:config@train[:1000]), got {text!r}."
        )
    source = paths[0] if paths else _source(text, match)
    if source.is_file and (source.config or source.split):
        raise UserError(f"{text!r}: a file has no configurations and splits; only a slice, {source.name}@[:1000].")
    return source


def _source(text: str, match: Any) -> Source:
    parts = {key: match[key] or None for key in ("config", "split")}
    return Source(text=text, name=match["name"], slice=match["slice"] or "", **parts)


def check_source(text: str) -> None:
    """Refuse a source that cannot be read, as far as its name tells; a data set of the hub is looked up later."""
    source = parse_source(text)
    if source.is_file:
        _check_file(source.path)
    elif (source.path.is_absolute() or text.startswith(".")) and not source.exists:
        raise MissingFileError(f"There is no file or folder {source.path.absolute()}.")


def read_rows(text: str) -> Rows:
    """The rows that a source names, in their order; an error if there are none.

    JSON and CSV are read by Python, so that every value is what the file says (in CSV a string); Parquet and hub data
    are Arrow tables. JSON lines stay on the disk, other files are kept in memory.
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


def is_arrow(rows: Rows) -> bool:
    """Whether `rows` are of a table with one type a column, in which what a row lacks is null."""
    return isinstance(rows, ArrowRows) or hasattr(rows, "features")


def place_of(rows: Rows, row: int) -> str:
    """Where a row is, for people: `line 17` of JSON lines, else `row 16 (from 0)`."""
    return rows.place(row) if isinstance(rows, JsonLines) else f"row {row} (from 0)"


def numbered(rows: Rows, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number; a value of a hub data set that Python cannot hold is named, as the readers of files do
    themselves."""
    try:
        yield from enumerate(rows)
    except UserError:
        raise
    except Exception as error:  # a text that is no UTF-8, a date in the year 300,000: of no common class
        for column in columns_of(rows):
            cells = rows.select_columns([column])  # type: ignore[attr-defined]
            for row in range(len(rows)):
                try:
                    cells[row]
                except Exception as reason:
                    raise UserError(f"{source}: row {row} (from 0), column {column!r}: {reason}") from error
        raise


def _check_file(path: Path) -> None:
    if not os.path.exists(path):
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
        if os.path.islink(path):
            hint = f" It is a link to {os.readlink(path)}."
        if "*" in path.name or "?" in path.name:
            hint = " A pattern is not expanded: put the files into a folder of their own and name that."
        raise MissingFileError(f"There is no file {path.absolute()}.{hint}")
    if format_of(path) not in READERS:
        known = f"{', '.join(READERS)}, each also with .gz, .bz2, .xz or .zst"
        raise UserError(f"{path}: cannot tell the format from {path.suffix!r}. Known: {known}.")


def _read_file(source: Source) -> Rows:
    _check_file(source.path)
    rows = read_file(source.path)
    if not source.slice:
        return rows
    from datasets import ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(f"all{source.slice}").to_absolute({"all": len(rows)})
    except (ValueError, AssertionError) as error:
        hint = "Say [:1000], [90%:], [10:20]."
        raise UserError(f"{source.text!r}: {source.slice} is no slice: {error}. {hint}") from error
    chosen = range(part.from_, max(part.from_, part.to))
    return rows[chosen.start : chosen.stop] if isinstance(rows, list) else rows.select(chosen)  # type: ignore[attr-defined]


def _read_data_set(source: Source) -> Any:
    from datasets import load_dataset

    name = str(source.path) if source.exists else source.name
    try:
        return load_dataset(name, source.config, split=f"{source.split or 'train'}{source.slice}")
    except Exception as error:  # datasets passes on what pyarrow, pandas, fsspec and httpx raise, of no common class
        reasons = "; ".join(dict.fromkeys(" ".join(f"{reason!s}".split()) or repr(reason) for reason in _causes(error)))
        if source.exists:
            reasons += _trouble_in(name, source.config)
        found = f"{'a folder' if source.exists else 'nothing'} is at {source.path.absolute()}"
        raise UserError(
            f"{source.text!r} is neither a file ({found}) nor a data set that can be loaded: {reasons}"
        ) from error


def _trouble_in(folder: str, config: str | None) -> str:
    """What is wrong with which file of a folder, as far as this package's own readers see it; for messages."""
    import pyarrow
    from datasets import Features, load_dataset_builder

    columns: set[str] = set()
    try:
        files = load_dataset_builder(folder, config).config.data_files or {}
        for path in [Path(file) for split in files.values() for file in split]:
            if format_of(path) in READERS:
                rows = read_file(path)
                for field in rows.table.schema if isinstance(rows, ArrowRows) else ():
                    try:
                        Features.from_arrow_schema(pyarrow.schema([field]))
                    except ValueError:
                        return f". {path}, column {field.name!r}: name the file, not its folder, to have it read."
                found = set(columns_of(rows))
                if columns and found != columns:
                    return f". {path} has the columns {sorted(found)}, other files have {sorted(columns)}."
                columns = found
    except UserError as error:
        return f". {error}"
    except Exception:  # the error that is being explained is told anyway
        return ""
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what caused it: datasets says `An error occurred` and leaves file and column to the cause."""
    while error is not None:
        yield error
        error = error.__cause__
