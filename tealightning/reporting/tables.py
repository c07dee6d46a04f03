"""Write tables as markdown and CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A markdown table with a column for each key of the first row (or for `columns`); missing cells stay empty.

    Raises:
        ValueError: if there are no rows and no columns.
    """
    if not rows and columns is None:
        raise ValueError("A table needs rows or columns.")
    names = list(columns if columns is not None else rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [str(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` as CSV, with the union of their keys in order of appearance as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
