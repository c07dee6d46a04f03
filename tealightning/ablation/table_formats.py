"""Write the tables of an ablation as markdown, LaTeX, CSV and HTML cells.

Rewards, shares and p-values are shown with 3 decimals, counts and seconds as whole numbers; the CSV has every digit.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tealightning.ablation.results_view import BUDGETS, DIAGNOSTICS, Estimate, Results, evaluated, main_split
from tealightning.ablation.tables import Cell, Table
from tealightning.reporting.tables import markdown_table

UNKNOWN = "–"

CSV_COLUMNS = ("split", "variant", "quantity", "n", "mean", "low", "high", "se", "p_value", "p_adjusted", "kl")

TEX_HEADER = "% Needs \\usepackage{booktabs}.\n"


def number_text(cell: Cell) -> str:
    """The number of a cell, rounded: `-0.123`, `12,345`, `<0.001`; `–` if it is not known."""
    if cell.value is None:
        return UNKNOWN
    if cell.kind == "count":
        return f"{cell.value:,.0f}"
    if cell.kind == "p_value" and cell.value < 0.001:
        return "<0.001"
    return rounded(cell.value)


def rounded(value: float) -> str:
    """3 decimals, and no minus sign on what is rounded to 0."""
    text = f"{value:.3f}"
    return text.removeprefix("-") if float(text) == 0 else text


def interval_text(cell: Cell) -> str:
    """`[0.100, 0.200]`; empty without an interval."""
    return "" if cell.low is None or cell.high is None else f"[{rounded(cell.low)}, {rounded(cell.high)}]"


def to_markdown(tables: Sequence[Table], title: str) -> str:
    """All tables as one markdown page."""
    parts = [f"# {markdown_text(title)}"]
    for table in tables:
        rows = [dict(zip(table.columns, (markdown_cell(cell) for cell in row), strict=True)) for row in table.rows]
        parts += [f"## {markdown_text(table.title)}", markdown_text(table.note), markdown_table(rows, table.columns)]
    return "\n\n".join(parts) + "\n"


def markdown_cell(cell: Cell) -> str:
    """`**1.234**\\* [1.100, 1.300]`."""
    if cell.kind == "text":
        return markdown_text(cell.text)
    number = number_text(cell).replace("<", "&lt;")
    number = f"**{number}**" if cell.best else number
    star = "\\*" if cell.star else ""
    return f"{number}{star} {interval_text(cell)}".rstrip()


def markdown_text(text: str) -> str:
    """User text that markdown shows as it is: no emphasis, code, links or HTML. (`markdown_table` escapes `|`.)"""
    text = re.sub(r"([\\`*\[\]#~])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no emphasis
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_latex(tables: Sequence[Table]) -> str:
    """All tables as booktabs `tabular`s in floats, labelled `tab:<key>`; of the runs only those that did not finish."""
    parts = [TEX_HEADER]
    for table in tables:
        if table.key != "runs":
            parts.append(latex_table(table))
            continue
        status, error = table.columns.index("status"), table.columns.index("error")
        rows = [row[: error + 1] for row in table.rows if row[status].text != "finished"]
        if rows:
            title = "Runs that did not finish"
            parts.append(
                latex_table(Table(key="runs", title=title, note="", columns=table.columns[: error + 1], rows=rows))
            )
    return "\n".join(parts)


def latex_table(table: Table) -> str:
    layout = "".join(latex_column(table, index) for index in range(len(table.columns)))
    heads = [latex_heading(name) for name in table.columns]
    name = re.sub("[^A-Za-z0-9]", "-", table.key)
    wide = len(table.columns) > 7
    size = r"\scriptsize\setlength{\tabcolsep}{1pt}" if wide else r"\footnotesize\setlength{\tabcolsep}{4pt}"
    lines = [" & ".join(latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    caption = latex_text(f"{table.title}. {table.note}".strip())
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            rf"\centering{size}",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex_heading(name: str) -> str:
    """Stacked at its comma or bracket: wide headings over narrow columns are what makes tables too wide."""
    stacked = (
        latex_text(name)
        .replace(", ", r",\\ ")
        .replace(" (", r"\\ (")
        .replace(" a ", r"\\ a ")
        .replace(" to the start", r"\\ to the start")
        .replace("probability of ", r"probability of\\ ")
    )
    return rf"\shortstack{{{stacked}}}" if stacked != latex_text(name) else stacked


def latex_column(table: Table, index: int) -> str:
    if table.columns[index] == "error":
        return r"p{0.5\linewidth}"
    return "l" if table.rows[0][index].kind == "text" else "r"


def latex_cell(cell: Cell) -> str:
    """The interval in small type below the number: side by side, five of them would not fit on a page."""
    if cell.kind == "text":
        return latex_text(cell.text)
    number = number_text(cell)
    number = "--" if number == UNKNOWN else f"${number.replace(',', '{,}')}$"
    if cell.best:
        number = rf"\textbf{{{number.replace('$', '')}}}".replace("{-", "{$-$")
    number += "$^{*}$" if cell.star else ""
    interval = interval_text(cell)
    return rf"\shortstack[r]{{{number}\\{{\tiny ${interval}$}}}}" if interval else number


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
    "[": "{[}",  # at the start of a row it would be an argument of the line break before it
    **{character: f"\\{character}" for character in "_&%$#"},
}


def latex_text(text: str) -> str:
    """User text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_csv(results: Results) -> str:
    """Every estimate of the tables in long format, with every digit: reading a number back gives that of results.json.

    The policy before training is the variant `(start)`. `quantity` is the key of results.json, with a dot where it is a
    part of another: `against_reference.win_rate`, `diagnostics.kl`, `budgets.rollouts`.
    """
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in csv_rows(results):
        writer.writerow({key: csv_text(value) for key, value in row.items()})
    return stream.getvalue()


def csv_text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return "" if value is None else str(value)


def csv_rows(results: Results) -> Iterator[dict[str, Any]]:
    for split in results.get("splits") or {}:
        for name, policy in evaluated(results, split, start=True).items():
            place = {"split": split, "variant": name}
            yield from (place | row for row in policy_rows(policy))
    split = main_split(results)
    for name, points in ((results.get("equal_kl") or {}).get("variants") or {}).items():
        for point in filter(None, points or ()):
            for quantity in ("best_of_n", "against_reference"):
                place = {"split": split, "variant": name, "quantity": f"equal_kl.{quantity}", "kl": point["kl"]}
                yield from (place | estimate_row(found) for found in point.get(quantity) or ())
    for name, spent in (results.get("budgets") or {}).items():
        place = {"split": "", "variant": name}
        yield from (place | {"quantity": f"budgets.{key}", "mean": spent.get(key)} for key in BUDGETS)


def policy_rows(policy: Any) -> Iterator[dict[str, Any]]:
    """The rows of one policy on one split."""
    for quantity in ("best_of_n", "gold_best_of_n", "against_reference", "against_start"):
        for found in policy.get(quantity) or ():
            yield {"quantity": quantity} | estimate_row(found)
            for part in ("probability_of_improvement", "win_rate"):
                if found.get(part):
                    yield {"quantity": f"{quantity}.{part}", "n": found["n"]} | estimate_row(found[part])
    for key in DIAGNOSTICS:
        if found := (policy.get("diagnostics") or {}).get(key):
            yield {"quantity": f"diagnostics.{key}"} | estimate_row(found)


def estimate_row(estimate: Estimate) -> dict[str, Any]:
    keys = ("n", "mean", "low", "high", "se", "p_value", "p_adjusted")
    return {key: estimate[key] for key in keys if key in estimate}
