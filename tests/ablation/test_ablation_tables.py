"""The tables in every format say what results.json says: exactly in the CSV, rounded elsewhere, cell by cell."""

import csv
import html.parser
import io
import re

import pytest
from ablation_results import ERROR, results_of

from tealightning.ablation.plots import all_plots
from tealightning.ablation.report import report_html
from tealightning.ablation.tables import CSV_COLUMNS, all_tables, to_csv, to_latex
from tealightning.reporting.tables import markdown_page, markdown_text

NUMBER = re.compile(r"<?-?\d[\d,]*(?:\.\d+)?")
DIAGNOSTICS = (
    "kl", "kl_per_token", "completion_length", "truncated_fraction", "distinct_1", "distinct_2", "self_similarity",
    "reward_std", "unscorable_fraction",
)  # fmt: skip
BUDGETS = ("optimizer_steps", "rollouts", "generated_tokens", "trained_tokens", "wall_seconds")


def at(estimates, n):
    return next(found for found in estimates if found["n"] == n)


def label(name):
    return {"tea": "TEA & <friends>"}.get(name, name)


def expected_tables(results):
    """key -> rows of (name, cells), straight from results.json: a cell is an estimate, a number, or None."""
    ns, headline, names = results["ns"], results["headline_n"], results["variants"]
    expected = {}
    for split, found in results["splits"].items():
        policies = {"before training": found["start"]} | {label(n): found["variants"][n] for n in names}
        trained = {label(n): found["variants"][n] for n in names}
        others = {name: policy for name, policy in trained.items() if name != results["reference"]}
        for key in ("best_of_n", "gold_best_of_n"):
            expected[f"{key}_{split}"] = [(name, [at(p[key], n) for n in ns]) for name, p in policies.items()]
        for key, who in (("against_reference", others), ("against_start", trained)):
            expected[f"{key}_{split}"] = [(name, [at(p[key], n) for n in ns]) for name, p in who.items()]
        tests = {name: at(policy["against_reference"], headline) for name, policy in others.items()}
        expected[f"reference_{split}"] = [
            (name, [t, t["probability_of_improvement"], t["win_rate"], t["p_value"], t["p_adjusted"]])
            for name, t in tests.items()
        ]
        expected[f"diagnostics_{split}"] = [
            (name, [p["diagnostics"][key] for key in DIAGNOSTICS]) for name, p in policies.items()
        ]
    kls = range(len(results["equal_kl"]["kls"]))
    points = results["equal_kl"]["variants"]
    expected["equal_kl"] = [
        (label(n), [at(points[n][i]["best_of_n"], k) if points[n][i] else None for i in kls for k in (1, headline)])
        for n in names
    ]
    pairs = {n: [p and p["against_reference"] for p in points[n]] for n in names if n != results["reference"]}
    expected["equal_kl_differences"] = [
        (label(n), [p and at(p, headline) for p in found]) for n, found in pairs.items()
    ]
    expected["budgets"] = [(label(n), [results["budgets"][n][key] for key in BUDGETS]) for n in names]
    return expected


def check_cell(text, value, places):
    """`text` as shown, without markup, equals `value` from results.json to the rounding."""
    found = NUMBER.findall(text)
    if value is None:
        assert text.strip() in ("–", "--")
        return
    numbers = [value["mean"], value["low"], value["high"]] if isinstance(value, dict) else [value]
    numbers = [number for number in numbers if number is not None]
    assert len(found) == len(numbers), text
    for shown, number in zip(found, numbers, strict=True):
        if shown.startswith("<"):
            assert shown == "<0.001" and 0 <= number < 0.001
        else:
            assert float(shown.replace(",", "")) == float(f"{number:.{places}f}"), (text, value)


def check_tables(parsed, results):
    """Every table, row and cell; `parsed` is key -> rows of texts."""
    expected = expected_tables(results)
    assert set(parsed) - {"runs"} == set(expected)
    for key, rows in expected.items():
        assert [row[0] for row in parsed[key]] == [name for name, _ in rows], key
        for shown, (_, values) in zip(parsed[key], rows, strict=True):
            assert len(shown) - 1 == len(values), key
            for text, value in zip(shown[1:], values, strict=True):
                check_cell(text, value, places=0 if key == "budgets" else 3)


def parse_markdown(text, tables):
    parsed, titles = {}, {markdown_text(table.title): table.key for table in tables}
    for block in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in block.splitlines() if line.startswith("| ")][1:]
        cells = [[plain(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        parsed[titles[block.splitlines()[0]]] = cells
    return parsed


def plain(cell):
    cell = re.sub(r"\\(.)", r"\1", cell.replace("**", "").replace(r"\*", "").strip())
    return cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def parse_latex(text):
    parsed = {}
    for block in re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, re.DOTALL):
        key = re.search(r"\\label\{tab:(.*?)\}", block)[1].replace("-", "_")
        body = block.split("\\midrule\n")[1].split("\\bottomrule")[0]
        rows = [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in body.splitlines()]
        parsed[key] = [[unlatex(cell) for cell in row] for row in rows]
    return parsed


def unlatex(cell):
    cell = cell.replace("{,}", ",").replace("$-$", "-").replace("$^{*}$", "")
    cell = (
        re.sub(r"\\(shortstack\[r\]|textbf|tiny)", "", cell)
        .replace(r"\textless{}", "<")
        .replace(r"\textgreater{}", ">")
    )
    return re.sub(r"[{}$]|\\(?=[&_%#{\[])", "", cell).replace("\\", " ")


class Tables(html.parser.HTMLParser):
    """key -> rows of texts of every table's body."""

    def __init__(self):
        super().__init__()
        self.tables, self.key, self.inside = {}, None, False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.key = dict(attrs)["id"].removeprefix("table-")
            self.tables[self.key] = []
        elif tag == "tr":
            self.tables[self.key].append([])
        elif tag in ("td", "th"):
            self.tables[self.key][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[self.key][-1][-1] += data


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def page(results):
    return report_html(results, all_tables(results), [], {})


def test_tables_in_markdown_equal_the_results(results):
    tables = all_tables(results)
    check_tables(parse_markdown(markdown_page("t", tables), tables), results)


def test_tables_in_latex_equal_the_results(results):
    check_tables(parse_latex(to_latex(all_tables(results))), results)


def test_tables_in_the_report_equal_the_results(results, page):
    parser = Tables()
    parser.feed(page)
    check_tables({key: rows[1:] for key, rows in parser.tables.items()}, results)  # the first row is the heading


def test_csv_has_every_estimate_of_the_results_with_every_digit(results):
    rows = list(csv.DictReader(io.StringIO(to_csv(results))))
    keys = CSV_COLUMNS[4:10]
    found = {}
    for row in rows:
        place = (row["split"], row["variant"], row["quantity"], row["n"], row["kl"])
        assert place not in found
        found[place] = {key: float(row[key]) for key in keys if row[key]}
    expected = {}

    def expect(split, variant, quantity, values, kl=""):
        known = {key: values[key] for key in keys if values.get(key) is not None}
        expected[split, variant, quantity, str(values.get("n", "")), kl] = known

    for split, content in results["splits"].items():
        for name, policy in ({"(start)": content["start"]} | content["variants"]).items():
            for quantity in ("best_of_n", "gold_best_of_n", "against_reference", "against_start"):
                for point in policy.get(quantity) or ():
                    expect(split, name, quantity, point)
                    for part in {"probability_of_improvement", "win_rate"} & point.keys():
                        expect(split, name, f"{quantity}.{part}", point[part] | {"n": point["n"]})
            for key, estimate in policy["diagnostics"].items():
                expect(split, name, f"diagnostics.{key}", estimate)
    for name, points in results["equal_kl"]["variants"].items():
        for point in filter(None, points):
            for estimate in point["best_of_n"]:
                expect("val", name, "equal_kl.best_of_n", estimate, kl=repr(point["kl"]))
            for estimate in point["against_reference"] or ():
                expect("val", name, "equal_kl.against_reference", estimate, kl=repr(point["kl"]))
    for name, budget in results["budgets"].items():
        for key, value in budget.items():
            expect("", name, f"budgets.{key}", {"mean": value})
    assert found == expected


def test_tables_mark_the_best_and_the_significant(results):
    tables = {table.key: table for table in all_tables(results)}
    rows = {row[0].text: row[1:] for row in tables["best_of_n_val"].rows}
    column = {name: cells[-1].value for name, cells in rows.items()}
    best = max(column, key=column.get)
    assert [name for name, cells in rows.items() if cells[-1].best] == [best]
    significant = {
        label(name)
        for name, policy in results["splits"]["val"]["variants"].items()
        if name != "grpo" and at(policy["against_reference"], 128)["p_adjusted"] < 0.05
    }
    assert 0 < len(significant) < 5
    assert {name for name, cells in rows.items() if cells[-1].star} == significant
    assert not any(cell.star for cells in rows.values() for cell in cells[:-1])
    assert {row[0].text for row in tables["reference_val"].rows if row[1].star} == significant


def test_tables_mark_equal_means_all_as_best():
    results = results_of(variants=2, splits=("val",))
    for policy in results["splits"]["val"]["variants"].values():
        policy["best_of_n"][0]["mean"] = 3.0
    (table,) = [table for table in all_tables(results) if table.key == "best_of_n_val"]
    assert [row[1].best for row in table.rows] == [False, True, True]


def test_run_table_has_every_run_and_failures_first(results):
    (table,) = [table for table in all_tables(results) if table.key == "runs"]
    status = [row[table.columns.index("status")].text for row in table.rows]
    assert status == ["failed", "missing"] + 28 * ["finished"]
    assert table.rows[0][table.columns.index("error")].text == ERROR


def test_markdown_keeps_an_error_in_its_cell(results):
    tables = all_tables(results)
    runs = parse_markdown(markdown_page("t", tables), tables)["runs"]
    assert {len(row) for row in runs} == {len(tables[-1].columns)}
    assert runs[0][3] == ERROR.replace("\n", " ")


def test_latex_shows_runs_that_did_not_finish_and_escapes_their_errors(results):
    text = to_latex(all_tables(results))
    assert r"step \textless{}12\textgreater{} of \_\_init\_\_ \& a\_b see 100\% of \{it\}" in text
    assert "finished" not in text.split(r"\label{tab:runs}")[1]
    assert not re.search(r"(?<!\\)[_%#]", text.split("\n", 1)[1])


@pytest.mark.parametrize("part", ["equal_kl", "training", "histograms", "checkpoints"])
def test_tables_and_plots_leave_out_what_was_not_measured(part):
    results = results_of(variants=2, splits=("val",), gold=False, kl=False, leave_out=(part,), failed=False)
    keys = {table.key for table in all_tables(results)}
    assert ("equal_kl" in keys) == (part != "equal_kl")
    assert not {key for key in keys if "gold" in key or "test" in key}
    assert "diagnostics_val" in keys
    names = {plot.name for plot in all_plots(results)}
    assert ("training" in names) == (part != "training")
    assert ("reward_histograms" in names) == (part != "histograms")


def test_tables_show_a_dash_for_what_is_not_known():
    results = results_of(variants=2, splits=("val",))
    results["splits"]["val"]["variants"]["grpo"]["best_of_n"][1] |= {"mean": None, "low": None, "high": None}
    lines = markdown_page("t", all_tables(results)).splitlines()
    assert next(line for line in lines if line.startswith("| grpo")).split(" | ")[2] == "–"
