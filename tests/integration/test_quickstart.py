"""`tealightning quickstart` for real, in a tiny maze world with vLLM; and the Python example of the README."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import QUICKSTART, run
from transformers import AutoModelForCausalLM

from tealightning.worlds import build_maze

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def spec_in(folder: Path, **changes: object) -> Path:
    """The quickstart's spec in a tiny world."""
    spec = yaml.safe_load((ROOT / "configs" / "ablations" / "quickstart.yaml").read_text())
    world = folder / "world"
    spec |= {
        "playgrounds": [{"out": str(world), "size": "tiny"}],
        "base": [QUICKSTART],
        "out": str(folder / "out"),
        "equal": {"optimizer_steps": 2},
        "evaluation": {"ns": [1, 4, 8], "prompts": 8},
    }
    spec["settings"] |= {
        "model.policy": str(world / "policy"),
        **{f"data.{split}": str(world / "prompts" / f"{split}.jsonl") for split in ("train", "val", "test")},
        "data.batch_size": 4,
        "rollout.sampling.max_new_tokens": 8,
        "trainer.accelerator": "cpu",
    }
    file = folder / "quickstart.yaml"
    file.write_text(yaml.safe_dump(spec | changes))
    return file


def test_quickstart_ends_with_one_table_and_writes_what_it_says(tmp_path: Path) -> None:
    file = spec_in(tmp_path)
    command = [sys.executable, "-m", "tealightning", "quickstart", "-c", str(file), "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr and "shards" not in done.stdout + done.stderr
    assert done.stderr.strip() == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ns"] == [1, 4, 8]
    for name in ("start", "grpo", "tea", "tea_minus_grpo"):
        assert len(summary[name]) == len(summary[f"{name}_se"]) == 3
    differences = [tea - grpo for tea, grpo in zip(summary["tea"], summary["grpo"], strict=True)]
    assert differences == pytest.approx(summary["tea_minus_grpo"], abs=1e-12)  # the same mazes: means subtract
    assert done.stdout.rstrip().endswith("|")  # the table is the last thing that is read
    last_row = f"| {summary['start'][2]:.3f} | {summary['grpo'][2]:.3f} | {summary['tea'][2]:.3f} |"
    (table,) = re.findall(r"\|    n \| start .*", done.stdout, re.S)
    assert last_row in table
    for name in ("best_of_n.png", "mazes.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    for variant in ("grpo", "tea"):
        (policy,) = (tmp_path / "out" / "runs" / variant).glob("*/policy")
        AutoModelForCausalLM.from_pretrained(policy)

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and table in again.stdout and "runs to do" not in again.stdout


def test_quickstart_refuses_another_comparison(tmp_path: Path) -> None:
    file = spec_in(tmp_path, seeds=[0, 1])
    result = run("quickstart", "-c", file)
    assert result.status == 2 and "compares the variants grpo and tea with one seed" in result.err


def test_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    """In a tiny world, two steps instead of all."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (example,) = (text for text in blocks if "trainer.fit" in text)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    build_maze(tmp_path / "runs" / "playground", size="tiny", progress=False)
    tiny = 'build_maze("runs/playground", size="tiny")'
    for long, short in (
        ('build_maze("runs/playground")', tiny),
        ("=60", "=2"),
        ("max_new_tokens=16", "max_new_tokens=8"),
    ):
        assert long in example
        example = example.replace(long, short)
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| +128 \| 0\.\d+ ± ", done.stdout + done.stderr)
