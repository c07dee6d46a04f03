"""Parts of the benchmarks that decide without a model."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tool_scripts import tool


def test_turns_alternate_loops_that_run_in_threads_of_their_own():
    turns = tool("bench/turns.py").Turns()
    steps: list[tuple[str, int]] = []

    def loop(name: str, count: int) -> None:
        for i in range(count):
            steps.append((name, i))
            turns.hand_over()

    turns.run(lambda: loop("a", 3), lambda: loop("b", 2))
    assert steps == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]


@pytest.mark.parametrize("first", [True, False])
def test_turns_raise_the_error_of_a_loop_and_end_the_other(first: bool):
    turns = tool("bench/turns.py").Turns()
    before = threading.active_count()

    def endless() -> None:
        while True:
            turns.hand_over()

    def failing() -> None:
        turns.hand_over()
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        turns.run(*((failing, endless) if first else (endless, failing)))
    assert threading.active_count() == before


def test_phase_clock_adds_up_calls_by_phase_and_starts_anew(monkeypatch: pytest.MonkeyPatch):
    timing = tool("bench/timing.py")
    ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr(timing, "now", lambda: next(ticks))

    class Engine:
        def generate(self, count: int) -> int:
            return count + 1

    engine, clock = Engine(), timing.PhaseClock()
    clock.time(engine, "generate", "generate")
    assert [engine.generate(1), engine.generate(2)] == [2, 3]
    assert clock.take() == {"generate": 3.0}
    engine.generate(3)
    assert clock.take() == {"generate": 5.0}
    assert Engine().generate(4) == 5  # the class keeps its method: nothing ticked, or the clock would be exhausted


def test_paired_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    ratio = tool("bench/timing.py").paired_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 4.0])
    assert ratio == {"median": 1.0, "min": 0.75, "max": 2.0}


def test_compare_calls_worse_what_grew_by_more_than_the_tolerance():
    compare = tool("bench_compare.py").compare
    before = [{"step_over_bare": 1.0, "train_over_bare": 1.0}] * 3
    after = [{"step_over_bare": value, "train_over_bare": 1.2} for value in (0.9, 1.04, 3.0)]
    rows = compare(before, after, 0.05)
    assert rows["step_over_bare"] == {"before": 1.0, "after": 1.04, "worse": False}
    assert rows["train_over_bare"]["worse"]


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_exact_texts_have_as_many_tokens_as_asked_for(tokens: int):
    tokenizer = tool("bench/tiny_models.py").byte_tokenizer()
    texts = tool("bench/texts.py").exact_texts(tokenizer, ["a first text", "and a second"], tokens, count=5)
    assert len(set(texts)) == 5
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [tokens] * 5


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return tool("bench/quality.py")


def points(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(seconds=2.0 * i, value=value) for i, value in enumerate(values)]


def test_seconds_until_are_those_of_the_first_evaluation_that_is_good_enough(quality):
    seconds_until = quality.seconds_until
    assert seconds_until(points(0.5, 0.7, 0.6, 0.9), 0.7) == 2.0
    assert seconds_until(points(0.5, 0.6), 0.7) is None


def test_seconds_over_those_of_a_side_that_never_gets_there_are_a_bound(quality):
    over = quality.over
    assert over([2.0, 4.0], [8.0, 4.0], [10.0, 10.0]) == {"ratio": 0.5, "is_bound": False}
    assert over([2.0, 4.0], [None, 4.0], [20.0, 10.0]) == {"ratio": 0.25, "is_bound": True}
    assert over([2.0, None], [8.0, 4.0], [10.0, 10.0]) == {"ratio": None, "is_bound": False}


def test_the_learning_rate_of_trl_is_the_one_that_gets_there_first_or_furthest(quality):
    rank = tool("bench_quality.py").rank
    first, later, never, worse = (points(0.5, *values) for values in ([0.8], [0.6, 0.8], [0.65], [0.6]))
    assert sorted([worse, later, first, never], key=lambda curve: rank(curve, 0.7)) == [worse, never, later, first]
