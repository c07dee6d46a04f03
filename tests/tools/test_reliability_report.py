"""The tables of docs/reliability.md."""

import subprocess
import sys

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


def test_session_says_what_became_of_the_tests(tmp_path):
    """Of the file that pytest itself writes: its format is not ours."""
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    )
    junit = tmp_path / "junit.xml"
    with pytest.raises(FileNotFoundError, match="make test-faults"):
        report.session(junit)
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", str(tmp_path / "none.ini")]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            f"--junitxml={junit}",
            "-o",
            "junit_suite_name=abc1234",
            "test_three.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert report.session(junit) == (
        "3 tests at commit abc1234, in 0 minutes: 1 failed, 0 ended with an error, 1 were skipped."
    )


def test_reports_are_named_alone_or_among_others():
    assert report.named("As in TRL #3021, #5619, open-instruct\n    #1161.") == {
        "TRL #3021", "TRL #5619", "open-instruct #1161"
    }  # fmt: skip
    assert report.named("Not TRL #30211, and not 3021.") == {"TRL #30211"}


def test_every_known_failure_of_peers_has_a_test_that_names_it():
    unguarded = [
        reference for reference, tests in report.guarding_tests(report.REPOSITORY / "tests").items() if not tests
    ]
    assert unguarded == []


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
