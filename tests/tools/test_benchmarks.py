"""The benchmarks run and say what they promise; the figures themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ["--size", "playground", "--prompts", "2", "--group-size", "6", "--tokens", "6", "--repeats", "2"]


def run_tool(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def json_line(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_bench_step_reports_phases_that_add_up(playground: Path, tmp_path: Path):
    folders = ["--playground", str(playground), "--cache", str(tmp_path)]
    line = json_line(run_tool("bench_step.py", *TINY, *folders, "--estimators", "grpo", "tea"))
    assert line["bench"] == "step"
    assert (line["prompts"], line["group_size"], line["tokens"]) == (2, 6, 6)
    assert set(line["seconds"]) == {"grpo", "tea", "plain"}
    assert set(line["train_over_plain"]) == {"grpo", "tea"}
    assert set(line["train_over_first"]) == {"tea"}
    assert set(line["bare_seconds"]) == {"generate", "reward", "train", "whole"}
    assert line["step_over_bare"]["min"] <= line["step_over_bare"]["median"] <= line["step_over_bare"]["max"]
    for seconds in line["seconds"].values():
        phases = {name: value for name, value in seconds.items() if name != "whole"}
        assert set(phases) == {"generate", "reward", "sync", "train", "other"}
        assert phases["sync"] == 0  # the transformers engine shares the trainer's weights
        assert min(phases["generate"], phases["reward"], phases["train"]) > 0
        # Medians of two steps are means, so the parts add up but for the rounding of each.
        assert sum(phases.values()) == pytest.approx(seconds["whole"], abs=1e-4)


@pytest.mark.slow
def test_bench_step_times_training_alone_at_exact_lengths_with_any_model(playground: Path, tmp_path: Path):
    folders = ["--playground", str(playground), "--cache", str(tmp_path), "--model", str(playground / "policy")]
    options = ["--engine", "none", "--prompt-tokens", "9", "--estimators", "grpo"]
    line = json_line(run_tool("bench_step.py", *TINY, *folders, *options))
    assert (line["size"], line["prompt_tokens"]) == ("policy", 9)
    assert line["bare_seconds"]["generate"] == line["bare_seconds"]["reward"] == 0
    assert line["train_over_plain"]["grpo"]["median"] > 0


@pytest.mark.slow
def test_bench_step_memory_compares_peaks(playground: Path, tmp_path: Path):
    folders = ["--playground", str(playground), "--cache", str(tmp_path)]
    line = json_line(run_tool("bench_step_memory.py", *TINY, *folders))
    assert line["peak_mib"]["plain"] > 50
    assert line["peak_over_plain"]["median"] == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_bench_scale_fits_an_exponent_to_each_series(playground: Path, tmp_path: Path):
    folders = ["--playground", str(playground), "--cache", str(tmp_path)]
    line = json_line(run_tool("bench_scale.py", *TINY, *folders, "--vary", "prompts", "tokens"))
    assert list(line["seconds"]["prompts"]) == ["1", "2", "4"]
    assert list(line["seconds"]["tokens"]) == ["1", "3", "6", "12"]
    assert line["seconds"]["prompts"]["2"] == line["seconds"]["tokens"]["6"]  # the same shape, measured once
    assert set(line["exponent"]) == {"prompts", "tokens"}


@pytest.mark.slow
def test_bench_peer_says_how_to_install_trl(tmp_path: Path):
    (tmp_path / "trl.py").write_text("raise ImportError('not here')")
    result = run_tool("bench_peer.py", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert 'pip install "tealightning[bench]"' in result.stderr


@pytest.mark.slow
def test_benchmarks_say_how_to_build_a_missing_playground(tmp_path: Path):
    result = run_tool("bench_step.py", "--playground", str(tmp_path / "none"), "--cache", str(tmp_path))
    assert result.returncode == 1
    assert "tealightning playground --world prose --out" in result.stderr


@pytest.mark.slow
def test_bench_quality_says_how_to_install_trl(tmp_path: Path):
    (tmp_path / "trl.py").write_text("raise ImportError('not here')")
    result = run_tool("bench_quality.py", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert 'pip install "tealightning[bench]"' in result.stderr


def test_bench_report_collects_figures_with_their_commands(tmp_path: Path):
    line = {
        "bench": "peer",
        "trl": "1.16.0",
        "size": "10m",
        "engine": "vllm",
        "prompts": 8,
        "group_size": 16,
        "prompt_tokens": 96,
        "tokens": 64,
        "step_over_trl": {"grpo": {"median": 0.75, "min": 0.7, "max": 0.8}},
        "command": "python tools/bench_peer.py",
        "commit": "abcdefg",
        "torch": "2.13.0",
        "threads": 1,
        "clock": "wall",
        "load": 0.5,
    }
    (tmp_path / "peer.txt").write_text(f"a table\n\n{json.dumps(line)}\n")
    result = run_tool("bench_report.py", str(tmp_path / "peer.txt"), "--out", str(tmp_path / "figures.md"))
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "figures.md").read_text()
    row = "| step over TRL 1.16.0's GRPO step, grpo | 10m | vllm | 8, 16, 96, 64 | 0.750 | 0.70 to 0.80 | (1) |"
    assert row in text
    assert "(1) `python tools/bench_peer.py`, commit abcdefg" in text


@pytest.mark.slow
def test_bench_startup_reports_a_ratio_for_each_command():
    line = json_line(run_tool("bench_startup.py", "--repeats", "1", "--commands", "estimators"))
    assert line.pop("bench") == "startup"
    assert line.keys() == {"repeats", "estimators"} and line["estimators"] > 0.5
