"""`tealightning diagnose gradients`: its files, its messages, and the documentation that is written from them."""

import csv
import importlib.util
import math
import re
import shlex
import sys
import types
from functools import partial
from pathlib import Path

import pytest
from command_line import run

from tealightning.cli.diagnose import gradients_parser
from tealightning.diagnostics import measurements

ROOT = Path(__file__).parents[2]
QUICK = ("--groups", "512", "--estimators", "grpo", "direct", "max_at_k:k=20", "tea:scale=none", "--worlds", "gaussian")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "deep" / "er"
    result = run("diagnose", "gradients", *QUICK, "two_arms", "--seed", "3", "--out", out)
    assert result.status == 0, result.err
    assert result.out.count("| `direct` |") == 2  # the first world's table, m = 16 and 32
    assert str(out / "fidelity.md") in result.out
    return out


def rows_of(folder: Path, name: str = "fidelity.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_has_a_table_for_each_world_and_says_where_it_comes_from(report):
    text = (report / "fidelity.md").read_text()
    assert re.findall("^## (.*)$", text, re.M) == ["gaussian", "two_arms"]
    assert "tealightning diagnose gradients --groups 512" in text
    assert "- seed: 3" in text
    assert "- commit: " in text
    assert "groups: 512 for each figure" in text
    assert "Exact gradient at N = 128: 1 (location), 2.595 (log-scale)." in text
    assert "| bias, logit of B |" in text
    section = text.partition("## gaussian")[2].partition("## two_arms")[0]
    names = re.findall(r"^\| `([^`]+)`", section, re.M)
    assert names == ["grpo", "direct", "max_at_k[k=20]", "tea[scale=none]"] * 2
    assert "| `max_at_k[k=20]` (1) | 16 | 128 | 0.25 | - | - | - |" in section
    assert "(1) max_at_k needs at least 20 rollouts" in section
    grpo = next(line for line in section.splitlines() if line.startswith("| `grpo`"))
    assert grpo.endswith("| - | - | - | - | - |")  # no bias: it has no scale
    assert "±" in grpo


def test_csv_holds_every_figure_with_its_error(report):
    rows = rows_of(report)
    assert len(rows) == 2 * 2 * 4
    direct = next(row for row in rows if (row["estimator"], row["m"], row["world"]) == ("direct", "16", "gaussian"))
    for name in ("bias[location]", "bias", "cosine", "scaled_bias", "rmse@32", "step_cosine@256", "sign_agreement@1"):
        assert math.isfinite(float(direct[name])), name
        assert float(direct[f"{name}_se"]) >= 0, name
    assert direct["units"] == "reward"
    assert float(direct["cosine"]) > 0.9
    assert direct["seed"] == "3"
    two_arms = next(row for row in rows if row["world"] == "two_arms")
    assert two_arms["bias[logit of B]"]
    assert not two_arms["bias[location]"]


def test_the_same_seed_gives_the_same_figures(report, tmp_path):
    run("diagnose", "gradients", *QUICK, "--seed", "3", "--out", tmp_path)
    again = [{**row, "command": ""} for row in rows_of(tmp_path)]
    first = [{**row, "command": ""} for row in rows_of(report) if row["world"] == "gaussian"]
    assert [[row[key] for key in again[0]] for row in first] == [list(row.values()) for row in again]


def test_sweeps_write_plots(tmp_path):
    result = run("diagnose", "gradients", *QUICK, "--sweeps", "alpha", "tail", "--out", tmp_path)
    assert result.status == 0, result.err
    text = (tmp_path / "fidelity.md").read_text()
    for name in ("alpha.png", "tail_index.png"):
        assert (tmp_path / name).is_file()
        assert f"]({name})" in text
    assert not (tmp_path / "bias_vs_m.png").exists()
    assert "| `grpo`" not in text.partition("## Over alpha")[2]


@pytest.mark.slow
def test_sweep_over_m_reports_slopes(tmp_path):
    args = ("--groups", "2000", "--estimators", "direct", "grpo", "--worlds", "gaussian", "--sweeps", "m")
    result = run("diagnose", "gradients", *args, "--out", tmp_path)
    assert result.status == 0, result.err
    section = (tmp_path / "fidelity.md").read_text().partition("## Over the group size")[2]
    slope = re.search(r"^\| `direct` \| (-\d\.\d\d) \[", section, re.M)
    assert slope is not None
    assert -1.2 < float(slope[1]) < -0.7
    assert "| `grpo`" not in section  # no scale, no bias
    assert (tmp_path / "bias_vs_m.png").is_file()


def test_decision_is_reported(tmp_path, monkeypatch):
    quick = partial(measurements.train_two_arms, prompts=2, steps=2)
    monkeypatch.setattr(measurements, "train_two_arms", quick)
    args = ("--decision", "-m", "16", "-N", "128", "--seeds", "2", "--estimators", "grpo", "max_at_k:k=20")
    result = run("diagnose", "gradients", *args, "--out", tmp_path)
    assert result.status == 0, result.err
    text = (tmp_path / "decision.md").read_text()
    assert "over 2 seeds" in text
    assert re.search(r"^\| `grpo` \| 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] \|$", text, re.M)
    assert "| `max_at_k[k=20]` | - (1) |" in text
    assert [row["m"] for row in rows_of(tmp_path, "decision.csv")] == ["16", "16"]
    assert not (tmp_path / "fidelity.csv").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--estimators", "te"), "Did you mean 'tea'"),
        (("--estimators", "tea:scael=none"), "no parameter 'scael'"),
        (("--estimators", "tea:scale=x"), "scale must be one of"),
        (("--worlds", "gausian"), "Did you mean 'gaussian'"),
        (("--sweeps", "alhpa"), "invalid choice: 'alhpa'"),
        (("-m", "1"), "-m: must be at least 2, got 1"),
        (("-N", "0"), "-N/--target_n: must be at least 1, got 0"),
        (("--alpha", "1.5"), "--alpha: must be in (0, 1], got 1.5"),
        (("--groups", "10"), "--groups: must be at least 512 (two steps over 256 prompts), got 10"),
        (("--decision", "--seeds", "0"), "--seeds: must be at least 1, got 0"),
        (("--group", "1000"), "unrecognized arguments: --group"),
    ],
)
def test_bad_input_is_one_message(args, message, tmp_path):
    result = run("diagnose", "gradients", *args, "--out", tmp_path / "new")
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "new").exists()


def test_help_lists_the_options():
    result = run("diagnose", "gradients", "--help")
    assert result.status == 0
    for option in ("-m", "-N", "--alpha", "--estimators", "--worlds", "--sweeps", "--decision", "--groups", "--out"):
        assert option in result.out


@pytest.mark.parametrize("option", [["-c", "x.yaml"], ["--config", "x.yaml"], ["--config=x.yaml"]])
def test_a_configuration_goes_to_the_policy_instrument(option, monkeypatch):
    given = []
    module = types.ModuleType("tealightning.cli.diagnose_policy")
    module.diagnose_policy_gradients = given.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert run("diagnose", "gradients", "--prompts", "3", *option).status == 0
    assert given == [["--prompts", "3", *option]]


# ---------------------------------------------------------------- documentation


def tool():
    spec = importlib.util.spec_from_file_location(
        "update_estimator_pages", ROOT / "tools" / "update_estimator_pages.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_get_their_rows_and_keep_the_rest(report, tmp_path):
    pages = {
        "grpo": "# grpo\n\nText.\n\n**When to use.** Never.\n",
        "direct": "# direct\n\n<!-- fidelity -->\nold\n<!-- /fidelity -->\n\nEnd \\1.\n",
        "max_at_k": "# max_at_k\n\n**When to use.** N <= m.\n",
        "tea": "# tea\n\n**When to use.** First.\n",
    }
    for name, text in pages.items():
        (tmp_path / f"{name}.md").write_text(text)
    module = tool()
    done = module.update_pages(report / "fidelity.csv", tmp_path)
    assert [page.stem for page in done] == list(pages)
    direct = (tmp_path / "direct.md").read_text()
    assert "old" not in direct
    assert direct.endswith("<!-- /fidelity -->\n\nEnd \\1.\n")
    assert direct.count("| `direct` |") == 2
    grpo = (tmp_path / "grpo.md").read_text()
    assert grpo.startswith("# grpo\n\nText.\n\n<!-- fidelity -->\n")
    assert grpo.endswith("<!-- /fidelity -->\n\n**When to use.** Never.\n")
    assert "commit" in grpo
    assert "`tea[scale=none]`" in (tmp_path / "tea.md").read_text()
    refused = (tmp_path / "max_at_k.md").read_text()
    assert "| `max_at_k[k=20]` (1) | 16 | - |" in refused
    assert "(1) max_at_k needs at least 20" in refused
    module.update_pages(report / "fidelity.csv", tmp_path)
    assert (tmp_path / "grpo.md").read_text() == grpo  # a second time changes nothing


def test_a_page_without_room_and_a_csv_without_the_estimator_are_errors(report):
    module = tool()
    with pytest.raises(ValueError, match="expected <!-- fidelity -->"):
        module.with_block("# empty\n", "block")
    with pytest.raises(ValueError, match="no row of entropic"):
        module.block("entropic", module.read_rows(report / "fidelity.csv"))


def test_results_page_is_filled_from_the_reports(tmp_path):
    source, page = tmp_path / "runs", tmp_path / "docs" / "page.md"
    source.mkdir()
    page.parent.mkdir()
    (source / "fidelity.md").write_text("# Title\n\n## gaussian\n\nRow.\n\n![alpha.png](alpha.png)\n")
    (source / "alpha.png").write_bytes(b"png")
    page.write_text("# Page\n\n<!-- include runs/fidelity.md -->\nold\n<!-- /include -->\n\nEnd.\n")
    module = tool()
    for _ in range(2):
        module.update_results(page, tmp_path)
        assert page.read_text() == (
            "# Page\n\n<!-- include runs/fidelity.md -->\n### gaussian\n\nRow.\n\n![alpha.png](alpha.png)\n"
            "<!-- /include -->\n\nEnd.\n"
        )
    assert (page.parent / "alpha.png").read_bytes() == b"png"


@pytest.mark.parametrize("page", ["docs/how-to/diagnose-gradients.md", "docs/results/gradient-fidelity.md"])
def test_commands_of_the_pages_are_accepted(page):
    lines = re.findall(r"^tealightning diagnose gradients.*$", (ROOT / page).read_text(), re.M)
    assert lines
    for line in lines:
        assert gradients_parser().parse_args(shlex.split(line)[3:]).sweeps in (["none"], ["all"])
