"""Cells are rounded for people and exact in CSV; text keeps no character with a meaning."""

import csv
import io

from tealightning.reporting.tables import (
    Table,
    TableCell,
    csv_text,
    latex_table,
    latex_text,
    markdown_page,
    markdown_table,
    markdown_text,
    write_csv,
)

TABLE = Table(
    key="a_b",
    title="A & B",
    note="",
    columns=["name", "value", "count, of all", "p"],
    rows=[
        [
            TableCell(text="x_y [1]"),
            TableCell(kind="number", value=-0.12345, low=-0.2, high=-0.0001, best=True, star=True),
            TableCell(kind="count", value=12345.4),
            TableCell(kind="p_value", value=0.0001),
        ],
        [TableCell(text="z"), *(TableCell(kind=kind) for kind in ("number", "count", "p_value"))],
    ],
)


def test_markdown_rounds_and_marks():
    page = markdown_page("t", [TABLE])
    assert r"| x_y \[1\] | **-0.123**\* [-0.200, 0.000] | 12,345 | &lt;0.001 |" in page
    assert "| z | – | – | – |" in page
    assert "## A &amp; B" in page


def test_latex_rounds_marks_and_stacks():
    text = latex_table(TABLE)
    assert r"\shortstack[r]{\textbf{$-$0.123}$^{*}$\\{\tiny $[-0.200, 0.000]$}} & $12{,}345$ & $<0.001$ \\" in text
    assert r"name & value & \shortstack{count,\\ of\\ all} & p \\" in text
    assert r"\label{tab:a-b}" in text and r"\begin{tabular}{lrrr}" in text
    assert r"z & -- & -- & -- \\" in text


def test_escapes_leave_no_character_with_a_meaning():
    assert latex_text(r"[a\b{c}~^|$") == r"{[}a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}\textbar{}\$"
    assert markdown_text("*a* `b` [c] <d> _e_ f_g") == r"\*a\* \`b\` \[c\] &lt;d&gt; \_e\_ f_g"


def test_markdown_table_keeps_a_cell_in_its_cell():
    assert markdown_table([{"a": "x|y", "b": "1\n2"}, {"a": 3}]) == "| a | b |\n|---|---|\n| x\\|y | 1 2 |\n| 3 |  |"


def test_csv_has_every_digit_and_the_union_of_the_columns(tmp_path):
    rows = [{"a": 0.1 + 0.2, "b": None}, {"a": 1, "c": "x,\ny"}]
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert read == [{"a": repr(0.1 + 0.2), "b": "", "c": ""}, {"a": "1", "b": "", "c": "x,\ny"}]
    write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_bytes() == csv_text(rows, line_end="\r\n").encode()
