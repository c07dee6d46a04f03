"""The tables of docs/results/ that are made from the CSV files beside the pages."""

import re
from pathlib import Path

import pytest
from ablation_results import results_of
from tool_scripts import tool

from tealightning.ablation.tables import to_csv

tables = tool("result_tables.py")
HEADER = "split,variant,quantity,n,mean,low,high,se,p_value,p_adjusted,kl\n"
CSV = (
    HEADER
    + """\
val,(start),best_of_n,1,-0.9591,-1.109,-0.806,,,,
val,(start),best_of_n,128,1.105,0.986,1.227,,,,
val,tea[m=16],best_of_n,1,-0.456,-0.661,-0.258,,,,
val,tea[m=16],best_of_n,128,1.535,1.388,1.683,,,,
val,tea[m=16],against_reference,128,-0.269,-0.44,-0.095,,0.012,<0.050,
test,tea[m=16],best_of_n,1,0.1,0,0.2,,,,
val,direct,best_of_n,1,0.5,,,,,,
val,direct,against_reference,128,0.1,0,0.2,,0.3,>=0.05,
val,direct,equal_kl.against_reference,128,0.025,-0.024,0.074,,,,1.02
,direct,budgets.trained_tokens,,18468.2,,,,,,
"""
)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    (tmp_path / "prose.csv").write_text(CSV, encoding="utf-8")
    return tables.read_rows(tmp_path / "prose.csv")


def test_pages_are_what_their_csv_files_say():
    pages = sorted(tables.RESULTS.glob("*.md"))
    assert sum(len(tables.BLOCK.findall(page.read_text())) for page in pages) > 8
    tables.main(["--check"])


def test_every_csv_file_is_named_with_its_command():
    pages = "\n".join(page.read_text() for page in tables.RESULTS.glob("*.md"))
    for file in tables.RESULTS.glob("*.csv"):
        assert re.search(
            rf"^\| \[{re.escape(file.name)}\]\({re.escape(file.name)}\) \| `(tealightning|python tools/)", pages, re.M
        )


def test_ablation_table_has_a_line_for_each_variant(rows):
    columns = ["best_of_n@1", "against_reference@128", "budgets.trained_tokens"]
    assert tables.ablation_table(rows, columns).splitlines() == [
        "| variant | mean reward (n = 1) | difference to grpo, n = 128 | trained tokens |",
        "|---|---|---|---|",
        "| before training | -0.959 [-1.109, -0.806] | – | – |",
        "| tea\\[m=16\\] | -0.456 [-0.661, -0.258] | -0.269\\* [-0.440, -0.095] | – |",
        "| direct | 0.500 | 0.100 [0.000, 0.200] | 18,468 |",
    ]


def test_differences_at_equal_kl_have_a_column_for_each_kl(rows):
    table = tables.ablation_table(rows, ["equal_kl.against_reference@128"])
    assert table.splitlines()[::2] == ["| variant | KL 1.02 |", "| direct | 0.025 [-0.024, 0.074] |"]


def test_a_grid_has_a_column_for_each_point_of_the_axes_named():
    variants = [
        "grpo[lr=0.1,kl=0.0]",
        "grpo[lr=0.4,kl=0.0]",
        "tea[lr=0.1,kl=0.0,alpha=0.5]",
        "tea[lr=0.4,kl=0.0,alpha=0.5]",
    ]
    common = {"split": "val", "quantity": "best_of_n", "n": "128"}
    rows = [{**common, "variant": name, "mean": f"{0.25 * i}"} for i, name in enumerate(["(start)", *variants])]
    assert tables.grid_table(rows, ["lr", "kl"], "best_of_n@128").splitlines() == [
        "| variant | lr 0.1, kl 0.0 | lr 0.4, kl 0.0 |",
        "|---|---|---|",
        "| before training | 0.000 | 0.000 |",
        "| grpo | 0.250 | 0.500 |",
        "| tea, alpha 0.5 | 0.750 | 1.000 |",
    ]


def test_a_column_that_the_csv_has_not_is_named(rows):
    with pytest.raises(ValueError, match="the CSV has no best_of_n@64"):
        tables.ablation_table(rows, ["best_of_n@64"])


@pytest.mark.parametrize(
    ("corrected", "starred"), [("", False), ("0.049", True), ("0.05", False), ("<0.001", True), (">=0.05", False)]
)
def test_a_star_is_a_corrected_p_value_below_0_05(corrected, starred):
    row = {"quantity": "against_reference", "mean": "1", "low": "0", "high": "2", "p_adjusted": corrected}
    assert ("\\*" in tables.estimate(row)) == starred


def test_csv_of_a_run_is_taken_over_with_its_plots(tmp_path: Path):
    results, run = tmp_path / "results", tmp_path / "runs" / "ablations" / "prose"
    (run / "plots").mkdir(parents=True)
    results.mkdir()
    (run / "table.csv").write_text(to_csv(results_of()), encoding="utf-8")
    for name in ("best_of_n", "histograms"):
        (run / "plots" / f"{name}.png").write_bytes(b"new")
    for name in ("prose.csv", "prose_best_of_n.png"):
        (results / name).write_bytes(b"old")
    tables.take_over(tmp_path / "runs", results)
    assert sorted(file.name for file in results.iterdir()) == ["prose.csv", "prose_best_of_n.png"]
    assert (results / "prose_best_of_n.png").read_bytes() == b"new"
    page = tables.with_tables("<!-- table prose.csv: best_of_n@1 diagnostics.kl -->\n<!-- /table -->", results)
    assert "| before training | " in page and "| KL to the start, nats a completion |" in page


def test_fidelity_table_has_a_column_for_each_world():
    rows = tables.read_rows(tables.RESULTS / "gradient-fidelity.csv")
    lines = tables.fidelity_table(rows, "scaled_bias", "m=16").splitlines()
    assert lines[0].startswith("| estimator | gaussian | gpd_-0.3 | ")
    (grpo,) = [line for line in lines if line.startswith("| `grpo` |")]
    assert grpo.startswith("| `grpo` | 0.93 | 0.78 | 0.70 |")
    assert "| `gaussian` | 1 (location), 2.595 (log-scale) |" in tables.exact_table(rows)


def test_temperatures_have_a_line_for_each_policy(tmp_path: Path):
    text = "policy,temperature,n,mean,se\nstart,1.0,1,0.04,0.005\nstart,1.0,4,0.1,0.01\nstart,1.0,128,0.75,0.03\n"
    (tmp_path / tables.TEMPERATURES).write_text(text, encoding="utf-8")
    page = tables.with_tables(f"<!-- table {tables.TEMPERATURES}: 1 128 -->\n<!-- /table -->", tmp_path)
    assert "| policy | temperature | best of 1 | best of 128 |" in page
    assert "| before training | 1.0 | 0.040 ± 0.005 | 0.750 ± 0.030 |" in page
