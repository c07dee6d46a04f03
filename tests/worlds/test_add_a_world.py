"""Executes docs/how-to/add-a-world.md."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tealightning.worlds import WORLDS, load_playground

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-world.md").read_text(encoding="utf-8")


def test_world_of_the_page_builds_and_is_reused(tmp_path, monkeypatch):
    monkeypatch.setattr("tealightning.worlds.folder.WORLDS", dict(WORLDS))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {"__name__": "digits"}
    exec(compile(block, "add-a-world.md", "exec"), scope)
    build = scope["WORLDS"]["digits"]
    built = build(tmp_path / "world", size="tiny", progress=False)
    assert not built.reused and build(tmp_path / "world", size="tiny", progress=False).reused
    with pytest.raises(ValueError, match="another config"):
        build(tmp_path / "world", progress=False)
    rows = [json.loads(line) for line in load_playground(built.path).val_prompts.read_text().splitlines()]
    assert rows[3] == {"id": "val-0003", "prompt": "val 3:"} and len(rows) == 50
    assert AutoModelForCausalLM.from_pretrained(built.policy).num_parameters() == built.manifest["policy_parameters"]
    assert scope["digit_reward"](prompts=["a", "b"], completions=["47", "x"], metadata=[{}, {}]) == [7.0, 0.0]
