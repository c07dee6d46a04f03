"""The examples of the documentation, run as they are printed."""

import inspect
import json
import math
import re
import threading
from pathlib import Path

import pytest
import yaml

from tealightning.rewards import FunctionReward, HTTPReward
from tealightning.rewards.base import REWARDS
from tealightning.rewards.http_client import scores_by_id

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
    example, _ = blocks("rewards.md", "python")
    (tmp_path / "my_reward.py").write_text(example)
    scores = FunctionReward(f"{tmp_path}/my_reward.py:exact")(
        ["p"] * 3, ["a 4", "5", "4"], [{"answer": "4"}] * 2 + [{}]
    )
    assert scores.total[:2].tolist() == [1.0, 0.0]
    assert math.isnan(scores.total[2])


def test_server_of_the_rewards_page_runs(monkeypatch):
    _, example = blocks("rewards.md", "python")
    names: dict = {"__name__": "my_server"}
    exec(example, names)
    monkeypatch.setattr(names["Scores"], "log_message", lambda *_: None)
    server = names["ThreadingHTTPServer"](("127.0.0.1", 0), names["Scores"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reward = HTTPReward(f"http://127.0.0.1:{server.server_port}/score", metadata_keys=["answer"])
        scores = reward(["2 + 2 ="] * 2, [" 4", " 5"], [{"answer": "4", "odd": {1}}] * 2)
    finally:
        server.shutdown()
        server.server_close()
    assert scores.total.tolist() == [1.0, 0.0]


def test_json_of_the_rewards_page_is_what_is_sent_and_read():
    asked, answered = map(json.loads, blocks("rewards.md", "json")[0].splitlines())
    item = HTTPReward("http://127.0.0.1:1")._encoded("4fc1-17", "2 + 2 =", " 4", {"answer": "4"})
    assert asked == {"items": [json.loads(item)]}
    assert scores_by_id(json.dumps(answered).encode(), {"4fc1-17"}) == {"4fc1-17": 1.0}


def test_settings_of_the_rewards_page_are_those_of_the_classes():
    page = (DOCS / "rewards.md").read_text()
    for reward, start in ((FunctionReward, "### A function that may"), (HTTPReward, "## HTTPReward")):
        table = page[page.index(start) :].partition("| setting |")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert named | {"function"} == set(inspect.signature(reward).parameters) | {"function"}


def test_yaml_of_the_rewards_page_names_what_exists():
    class_paths = re.findall(r"class_path: tealightning\.rewards\.(\w+)", (DOCS / "rewards.md").read_text())
    assert {REWARDS.get(name).__name__ for name in class_paths} == set(class_paths)
    assert all(yaml.safe_load(block)["rollout"]["reward"] for block in blocks("rewards.md", "yaml"))
