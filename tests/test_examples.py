"""The programs in docs/examples run, and what they train rises."""

import importlib.util
from pathlib import Path

import torch

from tealightning.functional.best_of_n import best_of_n

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_without_a_trainer_raises_the_best_of_128(playground, capsys):
    curve = example("minimal_loop").main(str(playground), steps=6)
    assert len(curve) == 6 and curve[-1] > curve[0] + 1, curve
    assert f"step 6: best of 128 is {curve[-1]:.2f}" in capsys.readouterr().out


def test_the_trainer_raises_best_of_n(playground, tmp_path):
    trainer = example("train").main(
        str(playground), steps=6, default_root_dir=tmp_path, limit_val_batches=2, enable_progress_bar=False
    )
    (report,) = [callback for callback in trainer.callbacks if type(callback).__name__ == "BestOfNReport"]
    before, after = (best_of_n(e.rewards, [16]).mean() for e in (report.before, report.after))
    assert (report.before.step, report.after.step) == (0, 6) and after > before + 1, (before, after)
    assert torch.equal(report.before.keys, report.after.keys)
    assert (tmp_path / "best_of_n.md").is_file()


def test_an_example_fits_a_page():
    lines = {file.name: len(file.read_text().splitlines()) for file in EXAMPLES.glob("*.py")}
    assert lines["minimal_loop.py"] <= 70 and lines["train.py"] <= 45, lines
