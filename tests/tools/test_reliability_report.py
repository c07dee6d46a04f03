"""The tables of docs/reliability.md."""

import numpy as np
import pytest
from tool_scripts import tool

report = tool("reliability_report.py")


def one(fault, times, lost="nothing", test="tests/faults/test_a.py::test_x", how="SIGKILL"):
    return {"fault": fault, "how": how, "times": times, "lost": lost, "test": test}


def test_fault_table_adds_up_what_is_the_same_fault():
    table = report.fault_table([one("a kill", 1200), one("a kill", 3, lost="a step"), one("full | disk", 1)])
    assert table.splitlines()[2:] == [
        "| a kill | SIGKILL | 1,203 | nothing, a step | `test_a.py::test_x` |",
        "| full \\| disk | SIGKILL | 1 | nothing | `test_a.py::test_x` |",
    ]


def test_report_without_fault_tests_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="make test-faults"):
        report.read_injected(tmp_path / "none.jsonl")


def test_guarding_tests_are_found_by_the_whole_number(tmp_path):
    (tmp_path / "test_it.py").write_text(
        'def test_a():\n    """Guards against TRL #3021."""\n\n\ndef test_b():\n    """Not TRL #30211."""\n'
    )
    assert report.guarding_tests(tmp_path)["TRL #3021"] == ["test_a"]


def test_slope_of_a_line_is_exact_and_of_noise_within_its_error():
    soak = tool("soak.py")
    steps = np.arange(1000.0)
    assert soak.slope(steps, 5 + 0.002 * steps) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    noise = np.random.default_rng(0).normal(size=1000)
    value, error = soak.slope(steps, noise)
    assert abs(value) < 3 * error < 1.0


def test_soak_run_empties_no_other_folder(tmp_path):
    soak = tool("soak.py")
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a soak run"):
        soak.empty(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
