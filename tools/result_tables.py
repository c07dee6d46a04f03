"""Fill the tables of docs/results/ from the CSV files beside the pages, and those of the quickstart.

    python tools/result_tables.py                # write the tables
    python tools/result_tables.py --check        # exit status 1 if a table is not what its CSV says
    python tools/result_tables.py --from runs    # first take over the CSV files and plots of new runs

What stands between `<!-- table FILE.csv: COLUMN ... -->` and `<!-- /table -->` is made here, a line for each variant.
Columns of an ablation are quantities of its `table.csv` (docs/ablations-results.md): `best_of_n@128`,
`diagnostics.kl`; those at equal KL fill a column for each KL. `by=lr,kl best_of_n@128` has a column for each learning
rate and KL penalty of a grid. `gradient-fidelity.csv` has tables of one figure, `scaled_bias m=16` with a column for
each world, and `exact`, the gradients themselves. Of `maze-temperature.csv` the n of best-of-n are named. The
quickstart's table stands between `<!-- quickstart table -->` and `<!-- /quickstart table -->`, made from
docs/results/quickstart/summary.json.
"""

import argparse
import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from tealightning.ablation.tables import BUDGETS, DIAGNOSTICS
from tealightning.cli.quickstart import table as quickstart_table
from tealightning.diagnostics.worlds import build_world
from tealightning.reporting.tables import markdown_table, markdown_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
QUICKSTART_PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
QUICKSTART_FILES = ("summary.json", "best_of_n.png", "mazes.png")
QUICKSTART = re.compile(r"(<!-- quickstart table -->\n).*?(<!-- /quickstart table -->)", re.DOTALL)
ABLATIONS = sorted(file.stem for file in (ROOT / "configs" / "ablations").glob("*.yaml"))
TEMPERATURES = "maze-temperature.csv"
BLOCK = re.compile(r"(<!-- table (\S+\.csv): ([^\n]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
TITLES = {
    "best_of_n": "best of {n}",
    "gold_best_of_n": "gold reward of the best of {n}",
    "against_reference": "difference to {reference}, n = {n}",
    "against_start": "difference to before training, n = {n}",
    **{f"diagnostics.{key}": title for key, title in DIAGNOSTICS.items()},
    **{f"budgets.{key}": title for key, title in BUDGETS.items()},
}
Row = dict[str, str]


def read_rows(file: Path) -> list[Row]:
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def ablation_table(rows: Sequence[Row], columns: Sequence[str], split: str = "val", reference: str = "grpo") -> str:
    """A line for each variant; a star where the corrected p-value is below 0.05, a dash where nothing is known."""
    rows = [row for row in rows if row["split"] in (split, "")]
    lines: dict[str, Row] = {}
    titles: dict[str, None] = {"variant": None}
    for column in columns:
        quantity, _, n = column.partition("@")
        found = [row for row in rows if row["quantity"] == quantity and row["mean"] and n in ("", row["n"])]
        if not found:
            raise ValueError(f"the CSV has no {column}.")
        for row in found:
            title = f"KL {row['kl']}" if row["kl"] else TITLES[quantity].format(n=row["n"], reference=reference)
            title = "mean reward (n = 1)" if column == "best_of_n@1" else title
            name = "before training" if row["variant"] == "(start)" else markdown_text(row["variant"])
            lines.setdefault(name, {"variant": name})[title] = estimate(row)
            titles[title] = None
    return markdown_table([{title: line.get(title, "–") for title in titles} for line in lines.values()])


def reference_of(ablation: str) -> str:
    """The variant that the others of an ablation are compared with."""
    spec = (ROOT / "configs" / "ablations" / f"{ablation}.yaml").read_text(encoding="utf-8")
    return str(yaml.safe_load(spec)["reference"])


def estimate(row: Row) -> str:
    """`1.234* [1.100, 1.300]`."""
    corrected = row["p_adjusted"]
    star = "\\*" if corrected and (corrected[0] == "<" or (corrected[0] != ">" and float(corrected) < 0.05)) else ""
    interval = f" [{float(row['low']):.3f}, {float(row['high']):.3f}]" if row["low"] else ""
    mean = float(row["mean"])
    return f"{mean:,.0f}" if row["quantity"].startswith("budgets") else f"{mean:.3f}{star}{interval}"


def fidelity_table(rows: Sequence[Row], figure: str, m: str) -> str:
    """One figure of every estimator, a column for each world."""
    lines: dict[str, Row] = {}
    for row in rows:
        if row["sweep"] == "main" and row["m"] == m.removeprefix("m="):
            line = lines.setdefault(row["estimator"], {"estimator": f"`{row['estimator']}`"})
            line[row["world"]] = f"{float(row[figure]):.2f}" if row[figure] else "–"
    return markdown_table(list(lines.values()))


def grid_table(rows: Sequence[Row], axes: Sequence[str], column: str) -> str:
    """One quantity of a grid, a column for each point of `axes` and a line for each variant on the other axes."""
    quantity, _, n = column.partition("@")
    rows = [row for row in rows if (row["split"], row["quantity"], row["n"]) == ("val", quantity, n)]
    lines: dict[str, Row] = {}
    for row in rows:
        if row["variant"] != "(start)":
            name, _, point = row["variant"].removesuffix("]").partition("[")
            at = dict(part.split("=") for part in point.split(","))
            name = ", ".join([name, *(f"{axis} {value}" for axis, value in at.items() if axis not in axes)])
            title = ", ".join(f"{axis} {at[axis]}" for axis in axes)
            lines.setdefault(name, {"variant": name})[title] = f"{float(row['mean']):.3f}"
    titles = list(next(iter(lines.values())))
    start = [f"{float(row['mean']):.3f}" for row in rows if row["variant"] == "(start)"]
    before = [dict.fromkeys(titles, value) | {"variant": "before training"} for value in start]
    return markdown_table([*before, *lines.values()])


def temperature_table(rows: Sequence[Row], ns: Sequence[str]) -> str:
    """Best-of-n with its standard error, a line for each policy and sampling temperature."""
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["n"] in ns:
            policy = "before training" if row["policy"] == "start" else row["policy"]
            line = lines.setdefault((policy, row["temperature"]), {"policy": policy, "temperature": row["temperature"]})
            line[f"best of {row['n']}"] = f"{float(row['mean']):.3f} ± {float(row['se']):.3f}"
    return markdown_table(list(lines.values()))


def exact_table(rows: Sequence[Row]) -> str:
    """The exact gradient of E[max of 128 rewards] in every world."""
    lines = []
    for name in dict.fromkeys(row["world"] for row in rows if row["sweep"] == "main"):
        world = build_world(name)
        parts = zip(world.exact_gradient(128).tolist(), world.directions, strict=True)
        gradient = ", ".join(f"{value:.4g} ({direction})" for value, direction in parts)
        lines.append({"world": f"`{name}`", "exact gradient at N = 128": gradient})
    return markdown_table(lines)


def with_tables(page: str, folder: Path) -> str:
    """The text of a page with its tables made anew from the CSV files in `folder`."""

    def filled(match: re.Match[str]) -> str:
        rows, columns = read_rows(folder / match[2]), match[3].split()
        if columns[0].startswith("by="):
            table = grid_table(rows, columns[0].removeprefix("by=").split(","), columns[1])
        elif match[2] in {f"{name}.csv" for name in ABLATIONS}:
            table = ablation_table(rows, columns, reference=reference_of(match[2].removesuffix(".csv")))
        elif match[2] == TEMPERATURES:
            table = temperature_table(rows, columns)
        else:
            table = exact_table(rows) if columns == ["exact"] else fidelity_table(rows, *columns)
        return f"{match[1]}{table}\n{match[4]}"

    return BLOCK.sub(filled, page)


def take_over(runs: Path, results: Path) -> None:
    """Copy the CSV files of finished runs, and those of their plots that the pages show; what is missing stays."""
    for name in ABLATIONS:
        folder = runs / "ablations" / name
        shown = {f"{name}_{plot.name}": plot for plot in (folder / "plots").glob("*.png")}
        for target, source in {f"{name}.csv": folder / "table.csv", **shown}.items():
            if source.is_file() and (results / target).exists():
                shutil.copyfile(source, results / target)
    for name, target in (("fidelity", "gradient-fidelity.csv"), ("decision", "gradient-fidelity-decision.csv")):
        if (source := runs / "gradient-fidelity" / f"{name}.csv").is_file():
            shutil.copyfile(source, results / target)
    for name in QUICKSTART_FILES:
        if (source := runs / "quickstart" / name).is_file():
            (results / "quickstart").mkdir(exist_ok=True)
            shutil.copyfile(source, results / "quickstart" / name)


def with_quickstart(page: str, folder: Path) -> str:
    """The text of a page with the quickstart's table made anew from `folder`."""
    summary = json.loads((folder / "quickstart" / "summary.json").read_text(encoding="utf-8"))
    return QUICKSTART.sub(lambda match: f"{match[1]}{quickstart_table(summary)}\n{match[2]}", page)


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument(
        "--from", dest="runs", type=Path, help="folder of the runs, whose CSV files and plots are copied"
    )
    options = parser.parse_args(args)
    if options.runs is not None:
        take_over(options.runs, RESULTS)
    makers = {page: with_tables for page in sorted(RESULTS.glob("*.md"))}
    for page, make in (makers | dict.fromkeys(QUICKSTART_PAGES, with_quickstart)).items():
        text = page.read_text(encoding="utf-8")
        made = make(text, RESULTS)
        if options.check and made != text:
            raise SystemExit(f"{page.name} is out of date: run `python tools/result_tables.py`.")
        if not options.check:
            page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
