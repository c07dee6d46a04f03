"""The examples of the documentation, run as they are printed."""

import math
import re
from pathlib import Path

import pytest
import yaml

from tealightning.rewards import FunctionReward
from tealightning.rewards.base import REWARDS

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_example_of_adding_a_reward_runs(monkeypatch):
    monkeypatch.setattr(REWARDS, "_classes", dict(REWARDS._classes))  # it registers itself: only for this test
    (example,) = blocks("how-to/add-a-reward.md", "python")
    names: dict = {"__name__": "my_rewards"}
    exec(example, names)
    near, far, unscorable = names["scores"].total.tolist()
    assert (near, far) == (0.0, -1.0)
    assert math.isnan(unscorable)
    with pytest.raises(ValueError, match="scale must be above 0"):
        names["DistanceReward"](scale=0.0)


def test_function_of_the_rewards_page_runs(tmp_path: Path):
    (example,) = blocks("rewards.md", "python")
    (tmp_path / "my_reward.py").write_text(example)
    scores = FunctionReward(f"{tmp_path}/my_reward.py:exact")(
        ["p"] * 3, ["a 4", "5", "4"], [{"answer": "4"}] * 2 + [{}]
    )
    assert scores.total[:2].tolist() == [1.0, 0.0]
    assert math.isnan(scores.total[2])


def test_yaml_of_the_rewards_page_names_what_exists():
    class_paths = re.findall(r"class_path: tealightning\.rewards\.(\w+)", (DOCS / "rewards.md").read_text())
    assert {REWARDS.get(name).__name__ for name in class_paths} == set(class_paths)
    assert all(yaml.safe_load(block)["rollout"]["reward"] for block in blocks("rewards.md", "yaml"))
