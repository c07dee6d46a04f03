"""Tables as markdown, CSV and LaTeX, and with plots on a stand-alone HTML page.

Numbers are shown with 3 decimals, counts and seconds as whole numbers. A cell holds the unrounded number.
"""

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = "–"


@dataclass(kw_only=True, slots=True, frozen=True)
class TableCell:
    """One cell: text, or a number with an optional interval."""

    kind: Literal["text", "number", "count", "p_value"] = "text"
    text: str = ""
    value: float | None = None  # None in a numeric cell = not known
    low: float | None = None
    high: float | None = None
    best: bool = False  # the highest of its column, shown bold
    star: bool = False  # a significant difference

    @property
    def shown(self) -> str:
        """The text, or the number rounded: `-0.123`, `12,345`, `<0.001`; `–` if it is not known."""
        if self.kind == "text":
            return self.text
        if self.value is None:
            return UNKNOWN
        if self.kind == "count":
            return f"{self.value:,.0f}"
        return "<0.001" if self.kind == "p_value" and self.value < 0.001 else rounded(self.value)

    @property
    def interval(self) -> str:
        """`[0.100, 0.200]`; empty without an interval."""
        return "" if self.low is None or self.high is None else f"[{rounded(self.low)}, {rounded(self.high)}]"


@dataclass(kw_only=True, slots=True, frozen=True)
class Table:
    """A table whose first column says what a row is of."""

    key: str  # unique on a page
    title: str
    note: str  # a sentence or two on how to read it
    columns: list[str]
    rows: list[list[TableCell]]


def rounded(value: float) -> str:
    """3 decimals, and no minus sign on what is rounded to 0."""
    text = f"{value:.3f}"
    return text.removeprefix("-") if float(text) == 0 else text


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A markdown table with a column for each key of the first row (or for `columns`); missing cells stay empty."""
    names = list(columns if columns is not None else rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [str(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_page(title: str, tables: Sequence[Table]) -> str:
    """All tables as one markdown page."""
    parts = [f"# {markdown_text(title)}"]
    for table in tables:
        rows = [dict(zip(table.columns, map(_markdown_cell, row), strict=True)) for row in table.rows]
        parts += [f"## {markdown_text(table.title)}", markdown_text(table.note), markdown_table(rows, table.columns)]
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: TableCell) -> str:
    if cell.kind == "text":
        return markdown_text(cell.text)
    number = cell.shown.replace("<", "&lt;")
    number = f"**{number}**" if cell.best else number
    star = "\\*" if cell.star else ""
    return f"{number}{star} {cell.interval}".rstrip()


def markdown_text(text: str) -> str:
    """User text that markdown shows as it is: no emphasis, code, links or HTML. (`markdown_table` escapes `|`.)"""
    text = re.sub(r"([\\`*\[\]#~])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no emphasis
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, line_end: str = "\n") -> str:
    """`rows` as CSV with every digit; None is empty. Columns: by default the union of the keys, as they come."""
    stream = io.StringIO(newline="")
    names = columns or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(stream, fieldnames=names, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `csv_text(rows)`, its lines ended as spreadsheets do."""
    path.write_text(csv_text(rows, line_end="\r\n"), encoding="utf-8", newline="")


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "\n": " ",
    "[": "{[}",  # at the start of a row it would be an argument of the line break before it
    **{character: f"\\{character}" for character in "{}_&%$#"},
}  # fmt: skip
_LATEX_BREAKS = {", ": r",\\ ", " (": r"\\ (", " a ": r"\\ a ", " to the ": r"\\ to the ", " of ": r" of\\ "}
"""Where headings are stacked: wide headings over narrow columns are what makes tables too wide."""


def latex_text(text: str) -> str:
    """User text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(table: Table) -> str:
    """A booktabs `tabular` in a float, labelled `tab:<key>`."""
    kinds = ["l" if cell.kind == "text" else "r" for cell in table.rows[0]]
    layout = [r"p{0.5\linewidth}" if name == "error" else kind for name, kind in zip(table.columns, kinds, strict=True)]
    wide = len(table.columns) > 7
    size = r"\scriptsize\setlength{\tabcolsep}{1pt}" if wide else r"\footnotesize\setlength{\tabcolsep}{4pt}"
    lines = [
        r"\begin{table}[htbp]",
        rf"\centering{size}",
        rf"\caption{{{latex_text(f'{table.title}. {table.note}'.strip())}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9]', '-', table.key)}}}",
        rf"\begin{{tabular}}{{{''.join(layout)}}}",
        r"\toprule",
        " & ".join(map(_latex_heading, table.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex_cell, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_heading(name: str) -> str:
    plain = stacked = latex_text(name)
    for text, broken in _LATEX_BREAKS.items():
        stacked = stacked.replace(text, broken)
    return rf"\shortstack{{{stacked}}}" if stacked != plain else plain


def _latex_cell(cell: TableCell) -> str:
    """The interval in small type below the number: side by side, five of them would not fit on a page."""
    if cell.kind == "text":
        return latex_text(cell.text)
    number = "--" if cell.value is None else f"${cell.shown.replace(',', '{,}')}$"
    if cell.best:
        number = rf"\textbf{{{number.replace('$', '')}}}".replace("{-", "{$-$")
    number += "$^{*}$" if cell.star else ""
    return rf"\shortstack[r]{{{number}\\{{\tiny ${cell.interval}$}}}}" if cell.interval else number


@dataclass(kw_only=True, slots=True)
class Plot:
    """A figure, the name of its files, a caption, and what stands in for it where it cannot be seen."""

    name: str
    figure: "Figure"
    caption: str
    alt: str


@dataclass(kw_only=True, slots=True)
class Box:
    """A framed note above the sections of a page."""

    title: str
    lead: str = ""  # a first sentence, in bold
    text: str = ""
    bullets: Sequence[str] = ()
    warning: bool = False


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of a page with a link in its contents; what is empty is left out."""

    key: str
    title: str
    text: str = ""
    bullets: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    folded: Sequence[Table] = ()  # open on a click
    code: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    folded_code: tuple[str, str] | None = None  # title, text


def html_page(
    title: str,
    *,
    boxes: Sequence[Box],
    sections: Sequence[Section],
    images: Mapping[str, bytes],
    description: str = "",
    meta: str = "",
) -> str:
    """The page, with styles and pictures inside: it loads nothing from elsewhere.

    `images`: name of a plot -> its SVG. `description` stands below the heading, `meta` in small print below that.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        # Long names may be broken after an underscore, and `n = 1` is held together.
        "breakable": lambda name: Markup(str(escape(name)).replace("_", "_<wbr>")),
        "unbroken": lambda text: text.replace(" = ", "\u00a0=\u00a0"),
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        boxes=boxes,
        sections=sections,
        images={name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in images.items()},
        description=description,
        meta=meta,
    )
