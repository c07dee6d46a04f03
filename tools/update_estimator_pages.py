"""Write measured gradient fidelity into the documentation.

    tealightning diagnose gradients
    python tools/update_estimator_pages.py runs/diagnose_gradients/fidelity.csv

Every page `docs/estimators/NAME.md` gets the rows of NAME and its variants in the Gaussian world (m = 16 and 32,
N = 128, alpha = 0.25) between `<!-- fidelity -->` and `<!-- /fidelity -->`; a page without these marks gets them before
its "**When to use.**" paragraph.

    python tools/update_estimator_pages.py --results docs/results/gradient-fidelity.md

fills that page instead: what stands between `<!-- include runs/.../fidelity.md -->` and `<!-- /include -->` becomes the
text of that generated file, without its title, and plots beside it that the page shows are copied next to the page.
`<!-- include runs/ablations/NAME/table.md#SECTION -->` takes one section of the tables of an ablation, without its
heading; a plot that the page shows as `NAME_PLOT.png` is then copied from its `plots/PLOT.png`. Tables that are made
from a CSV file beside the page are those of `result_tables.py`.
"""

import argparse
import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tealightning.diagnostics.fidelity_report import world_table

WORLD, MS, TARGET_N, ALPHA = "gaussian", (16, 32), 128, 0.25
BLOCK = re.compile(r"<!-- fidelity -->\n.*?<!-- /fidelity -->\n", re.DOTALL)
INCLUDE = re.compile(r"(<!-- include ([^\s#]+)(?:#([^\n]+?))? -->\n).*?(<!-- /include -->)", re.DOTALL)
BEFORE = "**When to use.**"
COLUMNS = ("estimator", "m", "angle error", "step cosine 1/32/256", "noise/signal", "rms(A)/signal", "bias/true")
_TEXT = {"sweep", "world", "estimator", "units", "note", "command", "commit", "seed"}
_WHOLE = {"m", "target_n"}


def read_rows(path: Path) -> list[dict]:
    """Rows of a `fidelity.csv` as they were measured: empty cells left out, figures as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: _value(key, text) for key, text in row.items() if text or key in _TEXT} for row in rows]


def _value(key: str, text: str) -> str | int | float:
    return text if key in _TEXT else int(text) if key in _WHOLE else float(text)


def block(name: str, rows: Sequence[dict]) -> str:
    """The marked block of one estimator's page.

    Raises:
        ValueError: if the rows hold nothing of it.
    """
    chosen = [
        row
        for row in rows
        if row["estimator"].partition("[")[0] == name
        and (row["sweep"], row["world"], row["target_n"], row["alpha"]) == ("main", WORLD, TARGET_N, ALPHA)
        and row["m"] in MS
    ]
    if not chosen:
        raise ValueError(
            f"The CSV has no row of {name} in the {WORLD} world at m in {MS}, N={TARGET_N}, alpha={ALPHA}."
        )
    source = f"`{chosen[0]['command']}`, commit {chosen[0]['commit']}, seed {chosen[0]['seed']}"
    return (
        "<!-- fidelity -->\n"
        f"**Fidelity.** Against the exact gradient of best-of-{TARGET_N} for normal rewards "
        "([what the columns mean](../how-to/diagnose-gradients.md#reading-the-table)):\n\n"
        f"{world_table(chosen, (), COLUMNS)}\n\n{source}.\n"
        "<!-- /fidelity -->\n"
    )


def with_block(page: str, text: str) -> str:
    """The page with its block replaced, or inserted before "When to use".

    Raises:
        ValueError: if it has room for neither.
    """
    if BLOCK.search(page):
        return BLOCK.sub(lambda _: text, page)
    if BEFORE not in page:
        raise ValueError(f"expected <!-- fidelity --> and <!-- /fidelity -->, or a paragraph {BEFORE!r}.")
    return page.replace(BEFORE, f"{text}\n{BEFORE}", 1)


def update_pages(table: Path, folder: Path) -> list[Path]:
    """Rewrite the pages of the estimators that the CSV holds; returns them. Variants of an estimator share its page."""
    rows = read_rows(table)
    pages = []
    for name in dict.fromkeys(row["estimator"].partition("[")[0] for row in rows):
        page = folder / f"{name}.md"
        if not page.is_file():
            raise ValueError(f"There is no page {page} for the estimator {name}.")
        page.write_text(with_block(page.read_text(encoding="utf-8"), block(name, rows)), encoding="utf-8")
        pages.append(page)
    return pages


def update_results(page: Path, root: Path) -> list[Path]:
    """Fill the `include` blocks of a page from files below `root`, and copy the plots; returns the files used."""
    used = []

    def filled(match: re.Match[str]) -> str:
        source = root / match[2]
        used.append(source)
        text = source.read_text(encoding="utf-8")
        text = section(text, match[3]) if match[3] else text.partition("\n")[2].strip()
        text = re.sub(r"^#", "##", text, flags=re.MULTILINE)
        return f"{match[1]}{text}\n{match[4]}"

    text = INCLUDE.sub(filled, page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        for source in used:
            plot = source.parent / "plots" / image.removeprefix(f"{source.parent.name}_")
            for found in (source.parent / image, plot if image.startswith(f"{source.parent.name}_") else None):
                if found is not None and found.is_file():
                    shutil.copyfile(found, page.parent / image)
    return used


def section(text: str, title: str) -> str:
    """What stands under `## title`.

    Raises:
        ValueError: if there is no such section.
    """
    for part in text.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        if heading == title:
            return body.strip()
    raise ValueError(f"there is no section {title!r}.")


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the pages and print their names."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", help="fidelity.csv, for the estimators' pages")
    parser.add_argument(
        "--docs", type=Path, default=root / "docs" / "estimators", help="folder of the estimators' pages"
    )
    parser.add_argument("--results", type=Path, help="a page with include blocks to fill")
    options = parser.parse_args(args)
    if options.csv is None and options.results is None:
        parser.error("nothing to do: name a fidelity.csv, or --results PAGE")
    done = update_pages(options.csv, options.docs) if options.csv else []
    done += update_results(options.results, Path.cwd()) if options.results else []
    print("\n".join(map(str, done)))


if __name__ == "__main__":
    main()
