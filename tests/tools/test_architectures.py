"""The table of architectures and engines in docs/results/."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from tool_scripts import TOOLS, tool

RESULTS = TOOLS.parent / "docs" / "results"
TRIALS = ("transformers_engine", "vllm_engine", "export")
NAMES = tool("bench/tiny_models.py").ARCHITECTURES


@pytest.fixture(scope="module")
def rows():
    with (RESULTS / "architectures.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_architecture_was_tried(rows):
    tried = {trial: [row["architecture"] for row in rows if row["trial"] == trial] for trial in TRIALS}
    assert tried["transformers_engine"] == tried["export"] == list(NAMES)
    assert len(tried["vllm_engine"]) >= 45 and set(tried["vllm_engine"]) <= set(NAMES)


def test_what_is_not_refused_is_right(rows):
    for row in rows:
        numbers = [float(row[column]) for column in ("fresh", "after_push") if row[column]]
        assert bool(row["refused"]) != bool(numbers), row
        limit = {"apertus": 1e-2, "gemma2": 2e-3}.get(row["architecture"], 1e-3)  # the page says why
        assert all(0 <= number < limit for number in numbers), row
    exports = [row["after_push"] for row in rows if row["trial"] == "export"]
    assert set(exports) == {"0"}


def test_page_is_made_of_the_csv(tmp_path: Path):
    (tmp_path / "architectures.csv").write_bytes((RESULTS / "architectures.csv").read_bytes())
    command = [sys.executable, TOOLS / "architectures.py", "--page", "--results", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "architectures.md").read_text() == (RESULTS / "architectures.md").read_text()


@pytest.mark.slow
def test_a_trial_is_measured_and_kept(tmp_path: Path):
    command = [sys.executable, TOOLS / "architectures.py", "--results", tmp_path, "--only", "qwen3_moe", "rwkv"]
    subprocess.run(command, check=True, capture_output=True)
    text = (tmp_path / "architectures.csv").read_text()
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "architectures.csv").read_text() == text  # nothing was left to do
    rows = {(row["architecture"], row["trial"]): row for row in csv.DictReader(text.splitlines())}
    assert float(rows["qwen3_moe", "vllm_engine"]["after_push"]) < 1e-4
    assert float(rows["rwkv", "transformers_engine"]["after_push"]) < 1e-4
    assert "vLLM" in rows["rwkv", "vllm_engine"]["refused"]
