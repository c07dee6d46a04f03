import asyncio
from pathlib import Path

import pytest
import torch

from tealightning.rewards import FunctionReward

PROMPTS, COMPLETIONS, METADATA = ["p", "p"], ["a", "bbb"], [{"best": 1}, {"best": 2}]


def length(prompts, completions, metadata):
    return [len(c) for c in completions]


def best(prompts, completions, metadata):
    return [m["best"] if c != "a" else None for c, m in zip(completions, metadata, strict=True)]


async def slow_length(prompts, completions, metadata):
    await asyncio.sleep(0)
    return torch.tensor([float(len(c)) for c in completions])


def totals(reward: FunctionReward) -> list[float]:
    return reward(PROMPTS, COMPLETIONS, METADATA).total.tolist()


def test_callable_is_called_and_gives_its_name():
    scores = FunctionReward(length)(PROMPTS, COMPLETIONS, METADATA)
    assert scores.total.tolist() == [1.0, 3.0]
    assert scores.total.dtype == torch.float64
    assert list(scores.components) == ["length"]


def test_none_is_unscorable():
    first, second = totals(FunctionReward(best))
    assert first != first  # NaN
    assert second == 2.0


def test_async_function_is_awaited():
    assert totals(FunctionReward(slow_length)) == [1.0, 3.0]


def test_async_function_works_inside_a_running_loop():
    async def notebook() -> list[float]:
        return totals(FunctionReward(slow_length))

    assert asyncio.run(notebook()) == [1.0, 3.0]


@pytest.mark.parametrize("separator", [":", "."])
def test_function_of_a_module_is_imported(tmp_path: Path, monkeypatch, separator):
    (tmp_path / "scores_of_mine.py").write_text(
        "def two(prompts, completions, metadata):\n    return [2] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert totals(FunctionReward(f"scores_of_mine{separator}two")) == [2.0, 2.0]


def test_function_of_a_file_is_imported(tmp_path: Path):
    file = tmp_path / "my scores.py"
    file.write_text("K = 3\n\ndef three(prompts, completions, metadata):\n    return [K for _ in completions]\n")
    assert totals(FunctionReward(f"{file}:three")) == [3.0, 3.0]


def test_unknown_function_suggests_the_nearest(tmp_path: Path):
    file = tmp_path / "scores.py"
    file.write_text("def length(**_): ...\n\ndef other(**_): ...\n")
    with pytest.raises(ValueError, match=r"no function 'lenght'. Did you mean 'length'\?"):
        FunctionReward(f"{file}:lenght")


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"no file {tmp_path}/none\.py"):
        FunctionReward(f"{tmp_path}/none.py:length")


def test_missing_module_suggests_the_file_of_that_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only_a_file.py").write_text("def f(**_): ...\n")
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", str(tmp_path))])
    with pytest.raises(ValueError, match=r"name its file: only_a_file\.py:f"):
        FunctionReward("only_a_file:f")
    with pytest.raises(ValueError, match=r"no module 'nowhere_at_all'.*nowhere_at_all\.py:f"):
        FunctionReward("nowhere_at_all:f")


def test_import_error_inside_the_users_module_is_shown_as_it_is(tmp_path: Path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_there"):
        FunctionReward("needs_more:f")


@pytest.mark.parametrize("path", ["length", ":length", "module:"])
def test_path_without_module_or_function_is_an_error(path):
    with pytest.raises(ValueError, match=r"function must be package\.module:function"):
        FunctionReward(path)


def test_what_is_not_callable_is_an_error(tmp_path: Path):
    (tmp_path / "constants.py").write_text("K = 3\n")
    with pytest.raises(ValueError, match="got 3"):
        FunctionReward(f"{tmp_path}/constants.py:K")


def test_wrong_count_names_function_and_counts():
    def one(prompts, completions, metadata):
        return [1.0]

    with pytest.raises(ValueError, match=r"'one' must return 2 values.*\(1,\)"):
        FunctionReward(one)(PROMPTS, COMPLETIONS, METADATA)


@pytest.mark.parametrize("value", [5, ["good", "bad"], None])
def test_what_is_no_list_of_numbers_is_an_error(value):
    def odd(prompts, completions, metadata):
        return value

    with pytest.raises(ValueError, match="'odd' must return one number per completion"):
        FunctionReward(odd)(PROMPTS, COMPLETIONS, METADATA)


def test_exception_of_the_function_is_chained_with_context():
    def broken(prompts, completions, metadata):
        return [metadata[0]["answer"]]

    with pytest.raises(RuntimeError, match=r"'broken' raised KeyError on 2 completions: 'answer'") as caught:
        FunctionReward(broken)(PROMPTS, COMPLETIONS, METADATA)
    assert isinstance(caught.value.__cause__, KeyError)
