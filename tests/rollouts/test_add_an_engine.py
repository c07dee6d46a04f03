"""Executes docs/how-to/add-an-engine.md."""

import re
from pathlib import Path

import pytest
from tiny_policies import (
    END_OF_TURN,
    PROMPTS,
    SEEDS,
    TOKENS,
    engine_context,
    largest_difference,
    save_policy,
    token_ids,
)

from tealightning.rollouts import RolloutEngine, build_engine
from tealightning.rollouts.base import ENGINES
from tealightning.types import SamplingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-an-engine.md").read_text()


@pytest.fixture
def plain_engine(monkeypatch):
    monkeypatch.setattr(ENGINES, "_classes", dict(ENGINES._classes))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "add-an-engine.md", "exec"), {"__name__": "my_engines"})
    return build_engine("plain_engine")


def test_the_engine_of_the_how_to_keeps_the_contract(plain_engine, tmp_path):
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.7, top_p=0.9, top_k=20, stop=["e", "ab"])
    context = engine_context(save_policy(tmp_path))
    plain_engine.start(context)
    grouped = plain_engine.generate(PROMPTS, num_samples=12, sampling=sampling, seeds=SEEDS)
    assert largest_difference(context.policy, PROMPTS, grouped, sampling) < 1e-5
    again = plain_engine.generate(PROMPTS[::-1], num_samples=12, sampling=sampling, seeds=SEEDS[::-1])
    assert token_ids(again[::-1]) == token_ids(grouped)
    completions = [c for group in grouped for c in group]
    written = ["".join(TOKENS[t] for t in c.token_ids if t != END_OF_TURN) for c in completions]
    ended = [text.endswith(("<eos>", "e", "ab")) for text in written]
    assert [c.truncated for c in completions] == [not end for end in ended]
    assert 3 < sum(ended) < 33
    assert not any("e" in c.text or "ab" in c.text for c in completions)
    with pytest.raises(ValueError, match="prompt 0 has 119 tokens"):
        plain_engine.generate([[5] * 119], num_samples=1, sampling=sampling, seeds=[1])
    plain_engine.close()
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        plain_engine.generate(PROMPTS, num_samples=1, sampling=sampling, seeds=SEEDS)


def test_the_how_to_names_the_methods_of_the_contract():
    assert set(re.findall(r"^- `(\w+)\(", PAGE, re.MULTILINE)) == RolloutEngine.__abstractmethods__
