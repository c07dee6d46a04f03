"""The report stands alone, says what the numbers say, and a failed write harms no older file."""

import html
import html.parser
import re
from pathlib import Path

import pytest
import yaml
from ablation_results import results_of

from tealightning.ablation.plots import all_plots
from tealightning.ablation.report import report_html, summary, write_outputs
from tealightning.ablation.tables import ResultsView, all_tables

PAGE = Path(__file__).parents[2] / "docs" / "ablations-results.md"


def html_of(results):
    plots = all_plots(results)
    return report_html(results, all_tables(results), plots, {plot.name: b"<svg/>" for plot in plots})


def small(**changes):
    """Two variants, one prompt set, every run finished."""
    return results_of(variants=2, splits=("val",), failed=False) | changes


def rivals(p_adjusted, gap):
    """Results in which `mean_reward` is `gap` above the reference at the headline n."""
    results = small()
    found = results["splits"]["val"]["variants"]
    found["grpo"]["best_of_n"][-1] |= {"mean": 1.5, "low": 1.4, "high": 1.6}
    found["mean_reward"]["best_of_n"][-1] |= {"mean": 1.5 + gap, "low": 1.4, "high": 1.8}
    difference = {"mean": gap, "low": gap - 0.1, "high": gap + 0.1, "p_adjusted": p_adjusted}
    found["mean_reward"]["against_reference"][-1] |= difference
    return results


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def page(results):
    return html_of(results)


class Links(html.parser.HTMLParser):
    """Tags that are open, ids, and everything that a page could load or link to."""

    VOID = ("meta", "img", "link", "br", "wbr", "input")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images = [], set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.open += [] if tag in self.VOID else [tag]
        if "id" in found:
            assert found["id"] not in self.ids, found["id"]
            self.ids.add(found["id"])
        self.links += [found[key] for key in ("href", "src", "data", "action") if key in found]
        self.images += [found] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_well_formed_and_loads_nothing(page):
    links = Links(page)
    assert links.open == []
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links.links)
    assert {link[1:] for link in links.links if link.startswith("#")} <= links.ids
    assert not re.search(r"url\(|@import|https?://", page)


def test_report_has_every_table_and_every_plot(results, page):
    links = Links(page)
    assert {f"table-{table.key}" for table in all_tables(results)} <= links.ids
    assert {image["alt"] for image in links.images} == {plot.alt for plot in all_plots(results)}


def test_report_of_many_variants_has_every_table_and_every_plot():
    results = results_of(variants=8)
    page = html_of(results)
    assert page.count("<img ") == len(all_plots(results)) == 14
    assert page.count("<table ") == len(all_tables(results))


def test_report_escapes_names_and_errors(page):
    assert "TEA &amp; &lt;friends&gt;" in page
    assert "<friends>" not in page
    assert "step &lt;12&gt; of __init__ &amp; a_b" in page


def test_report_names_failed_and_missing_runs_before_the_summary(page):
    top = page[: page.index("<h2>Summary</h2>")]
    assert "2 of 30 runs did not finish" in top
    assert "optimal_tea, seed 4: failed: ValueError" in top
    assert "optimal_tea, seed 3: missing" in top
    assert "Not every variant has 5 finished seeds: optimal_tea 3." in top


def test_report_warns_of_different_commits():
    results = small()
    assert "different commits" not in html_of(results)
    results["runs"][0]["commit"] = "ffff"
    assert "The runs come from 2 different commits: 0123abc45, ffff." in html_of(results)


def test_report_has_methods_spec_and_provenance(results, page):
    for text in [*results["statistics"], "Held-out prompts: 48 prompts, 128 samples of each."]:
        assert text in html.unescape(page)
    assert results["provenance"]["command"] in page
    spec = page.split("The spec as it was resolved</summary>\n<pre>")[1].split("</pre>")[0]
    assert yaml.safe_load(spec) == results["spec"]


@pytest.mark.parametrize("part", ["equal_kl", "training", "histograms", "checkpoints"])
def test_report_leaves_out_what_was_not_measured(part):
    results = results_of(variants=2, splits=("val",), gold=False, kl=False, leave_out=(part,), failed=False)
    links = Links(html_of(results | {"labels": None, "description": None}))
    assert "gold" not in links.ids
    assert {"best_of_n", "methods", "runs"} <= links.ids


def test_report_shows_of_a_traceback_the_last_line():
    results = small()
    for run in results["runs"]:
        run |= {"status": "failed", "error": "Traceback\n  File\nOSError: disk full"}
    page = html_of(results)
    assert "10 of 10 runs did not finish" in page
    assert "mean_reward, seed 0: failed: OSError: disk full" in page


def test_summary_names_the_leader_and_its_corrected_difference():
    lines = summary(ResultsView(rivals(0.012, 0.2)))
    assert lines[0] == (
        "At n = 128 on the validation prompts, mean_reward has the highest best-of-n, 1.700 [1.400, 1.800]: "
        "+0.200 [0.100, 0.300] over grpo (p = 0.012 after correction)."
    )
    assert "After the correction for 1 comparison at n = 128, better than grpo: mean_reward; worse: none." in lines


def test_summary_says_when_no_difference_survives_the_correction():
    lines = summary(ResultsView(rivals(0.06, 0.2)))
    assert "p = 0.060 after correction" in lines[0]
    assert any(line.startswith("No difference to grpo at n = 128 survives") for line in lines)


def test_summary_says_when_the_reference_leads():
    lines = summary(ResultsView(rivals(0.012, -0.2)))
    assert lines[0] == (
        "At n = 128 on the validation prompts, grpo has the highest best-of-n, 1.500 [1.400, 1.600]; second is "
        "mean_reward, -0.200 [-0.300, -0.100] against it (p = 0.012 after correction)."
    )
    assert "After the correction for 1 comparison at n = 128, better than grpo: none; worse: mean_reward." in lines


def test_summary_says_who_leads_at_n_1_and_who_fell_below_the_start():
    results = rivals(0.012, 0.2)
    found = results["splits"]["val"]["variants"]
    found["grpo"]["best_of_n"][0] |= {"mean": 9.0, "low": None, "high": None}
    found["grpo"]["against_start"][-1] |= {"mean": -0.3, "low": -0.4, "high": -0.2}
    found["mean_reward"]["against_start"][-1] |= {"mean": 0.3, "low": 0.2, "high": 0.4}
    lines = summary(ResultsView(results))
    assert "grpo leads at n = 1, the mean reward, instead: 9.000." in lines
    assert (
        "Training raised best-of-128 above the starting policy's in 1 of 2 variants (intervals that exclude 0); "
        "it lowered it in grpo (-0.300 [-0.400, -0.200])."
    ) in lines


def test_summary_says_by_gold_who_leads_and_who_is_below_the_start():
    results = small()
    split = results["splits"]["val"]
    split["start"]["gold_best_of_n"][-1] |= {"mean": 1.0, "low": 0.9, "high": 1.1}
    for name, mean in (("grpo", 1.2), ("mean_reward", 0.8)):
        split["variants"][name]["gold_best_of_n"][-1] |= {"mean": mean, "low": None, "high": None}
    assert (
        "By the gold reward, the highest at n = 128 is grpo, 1.200; below the mean before training, "
        "1.000 [0.900, 1.100]: mean_reward."
    ) in summary(ResultsView(results))


def test_summary_says_when_the_reference_did_not_finish():
    results = small(variants=["mean_reward"])
    del results["splits"]["val"]["variants"]["grpo"]
    results["splits"]["val"]["variants"]["mean_reward"]["against_reference"] = None
    assert any("Nothing is compared with grpo" in line for line in summary(ResultsView(results)))
    assert "table-reference_val" not in html_of(results)


def test_write_outputs_writes_every_file_and_repeats_them_exactly(tmp_path):
    unplotted = ("checkpoints", "training", "histograms")
    results = results_of(variants=2, splits=("val",), gold=False, leave_out=unplotted, failed=False)
    files = write_outputs(results, tmp_path / "out")
    written = {path: path.read_bytes() for path in files}
    assert {"table.md", "table.csv", "table.tex", "report.html"} <= {path.name for path in files}
    assert {path.suffix for path in files if path.parent.name == "plots"} == {".png", ".svg"}
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(files)
    earlier = tmp_path / "out" / "plots" / "of_an_earlier_call.png"
    earlier.write_bytes(b"")
    write_outputs(results, tmp_path / "out")
    assert {path: path.read_bytes() for path in files} == written
    assert not earlier.exists()


def keys_of(value, path=()):
    """Every key of results.json that is not itself a name (of a variant, a split, a metric, a package or a setting)."""
    names = ("spec", "labels", "variants", "budgets", "splits", "checkpoints", "training", "versions")
    if isinstance(value, dict):
        for key, inner in value.items():
            is_name = path and path[-1] in names and not (path[-1] == "versions" and isinstance(inner, dict))
            if not is_name:
                yield key
            if path[-1:] != ("spec",):
                yield from keys_of(inner, (*path, "name" if is_name else key))
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner, path)


def test_page_of_the_results_documents_every_key(results):
    named = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    keys = set(keys_of(results))
    assert {"p_adjusted", "self_similarity", "headline_n", "edges", "step", "amount", "wall_seconds"} <= keys
    assert not keys & {"grpo", "val"}
    assert keys - named == set()
