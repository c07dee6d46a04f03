"""FunctionReward in a process of its own, and with errors that end no run. The faults that need time: tests/faults."""

import functools
import math
import os
import warnings
from pathlib import Path

import pytest
import reward_functions
import torch
from reward_functions import score_of

from tealightning.rewards import FunctionReward, WeightedReward
from tealightning.rewards.base import bisect_failures
from tealightning.rewards.function import FunctionRaisedError, WorkerStartError

FUNCTION = f"{reward_functions.__file__}:misbehaving"


@pytest.fixture
def worker():
    """Makes rewards that are closed when the test ends."""
    made = []

    def make(function=FUNCTION, **settings):
        made.append(FunctionReward(function, **{"timeout_seconds": 60.0} | settings))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def call(reward, *completions):
    return reward(["p"] * len(completions), list(completions), [{}] * len(completions))


def test_scores_are_those_of_the_function_to_the_last_bit(worker):
    scores = call(worker(), "a", "b", "c")
    assert scores.total.tolist() == [score_of(c) for c in "abc"]
    assert scores.counts == {"misbehaving": {"timeouts": 0, "crashes": 0, "errors": 0, "unscored": 0}}


@pytest.mark.parametrize("function", [reward_functions.count_words, "json:dumps", "reward_functions.count_words"])
def test_functions_of_modules_keep_their_name(worker, function):
    assert worker(function).name in ("count_words", "dumps")


@pytest.mark.parametrize("name", ["scores_async", "scores_array"])
def test_async_functions_and_arrays_work(worker, tmp_path: Path, name):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n\n"
        "async def scores_async(prompts, completions, metadata):\n    await asyncio.sleep(0)\n    return [1, None]\n\n"
        "def scores_array(prompts, completions, metadata):\n"
        "    import numpy\n    return numpy.array([1.0, float('nan')], dtype='float32')\n"
    )
    first, second = call(worker(f"{tmp_path}/mine.py:{name}"), "a", "b").total.tolist()
    assert first == 1.0 and math.isnan(second)


def test_process_is_not_the_trainers_and_loads_no_torch(worker, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import os, sys\n\ndef pid(prompts, completions, metadata):\n"
        "    return [os.getpid(), os.getppid(), float('torch' in sys.modules)]\n"
    )
    pid, parent, has_torch = call(worker(f"{tmp_path}/mine.py:pid"), "a", "b", "c").total.tolist()
    assert os.getpid() not in (pid, parent)
    assert has_torch == 0.0


def test_what_the_function_raises_ends_the_run_with_its_traceback_by_default(worker):
    with pytest.raises(
        FunctionRaisedError, match=r"'misbehaving' raised KeyError on 2 completions: 'answer'"
    ) as caught:
        call(worker(), "a", "<raise>")
    assert "reward_functions.py" in str(caught.value.__cause__) and "in raises" in str(caught.value.__cause__)


def test_wrong_number_or_kind_of_values_is_the_same_error_as_in_process(worker):
    with pytest.raises(ValueError, match=r"'misbehaving' must return 2 values.*\(1,\)"):
        call(worker(), "a", "<short>")
    with pytest.raises(ValueError, match=r"'misbehaving' must return one number per completion.*'high'"):
        call(worker(), "a", "<text>")


@pytest.mark.parametrize("settings", [{}, {"timeout_seconds": None}])
def test_errors_can_cost_their_completion_only(worker, settings):
    reward = worker(on_error="unscored", **settings)
    with pytest.warns(
        UserWarning, match=r"'misbehaving' has no score for 1 completions: .* raised KeyError on 1 completions"
    ):
        scores = call(reward, "a", "b", "<raise>", "c", "d")
    assert math.isnan(scores.total[2])
    assert [scores.total[i] for i in (0, 1, 3, 4)] == [score_of(c) for c in "abcd"]
    assert scores.counts["misbehaving"]["unscored"] == 1
    assert "KeyError" in reward.problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        call(reward, "<raise>")


def test_in_process_with_defaults_nothing_is_counted_and_nothing_caught():
    reward = FunctionReward(reward_functions.misbehaving)
    assert call(reward, "a").counts == {}
    with pytest.raises(FunctionRaisedError):
        call(reward, "<raise>")


def test_crash_is_told_with_its_signal_and_another_process_goes_on(worker):
    reward = worker()
    with pytest.warns(UserWarning, match=r"its process ended \(SIGSEGV\)"):
        scores = call(reward, "a", "<segfault>")
    assert scores.total[0] == score_of("a") and math.isnan(scores.total[1])
    assert call(reward, "b").total.tolist() == [score_of("b")]


def test_what_another_process_cannot_import_is_refused(worker):
    def local(prompts, completions, metadata): ...

    for function in (
        local,
        lambda **_: [],
        functools.partial(reward_functions.scores),
        reward_functions.Path("x").exists,
    ):
        with pytest.raises(ValueError, match=r"a worker process \(timeout_seconds\) cannot import"):
            worker(function)
    with pytest.raises(ValueError, match="there is no file"):
        worker("nowhere/at_all.py:f")
    with pytest.raises(ValueError, match="there is no module 'nowhere_at_all'"):
        worker("nowhere_at_all:f")


def test_import_that_fails_is_an_error_of_setup_that_says_why(worker, tmp_path: Path):
    (tmp_path / "broken.py").write_text("import package_that_is_not_there\n")
    (tmp_path / "ends.py").write_text("import os\nos._exit(4)\n")
    for file, message in (("broken.py:f", "package_that_is_not_there"), ("ends.py:f", "exit code 4")):
        with pytest.raises(WorkerStartError, match=message):
            worker(f"{tmp_path}/{file}").setup(torch.device("cpu"))
    with pytest.raises(WorkerStartError, match="has no function 'lenght'"):
        worker(f"{reward_functions.__file__}:lenght", on_error="unscored").setup(torch.device("cpu"))


def test_metadata_that_cannot_be_sent_is_an_error(worker):
    with pytest.raises(ValueError, match="metadata holds what cannot be sent"):
        worker()(["p"], ["c"], [{"odd": lambda: 0}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_seconds": 0.0}, "timeout_seconds must be a finite number above 0"),
        ({"timeout_seconds": math.nan}, "timeout_seconds must be a finite number above 0"),
        ({"timeout_seconds": 1.0, "deadline_seconds": -1.0}, "deadline_seconds must be a finite number above 0"),
        ({"timeout_seconds": None, "deadline_seconds": 1.0}, "deadline_seconds has no effect"),
        ({"on_error": "ignore"}, "on_error must be one of raise, unscored, got 'ignore'"),
    ],
)
def test_setting_out_of_range_is_refused(worker, settings, message):
    with pytest.raises(ValueError, match=message):
        worker(**settings)


def test_weighted_sum_has_no_total_where_the_function_failed(worker):
    parts = {"odd": worker(on_error="unscored"), "words": FunctionReward(reward_functions.count_words)}
    with pytest.warns(UserWarning):
        scores = call(WeightedReward(parts, {"odd": 1.0, "words": 2.0}), "a b", "<raise>")
    assert scores.total[0] == score_of("a b") + 4.0 and math.isnan(scores.total[1])
    assert scores.components["words"].tolist() == [2.0, 1.0]
    assert scores.counts["odd"]["errors"] == 2


@pytest.mark.parametrize(
    ("count", "bad"), [(1, []), (1, [0]), (8, [3]), (100, [0, 50, 99]), (7, list(range(7))), (0, [])]
)
def test_halves_find_every_bad_row(count, bad):
    attempts = []

    def attempt(rows):
        attempts.append(list(rows))
        return None if set(rows) & set(bad) else [10.0 * row for row in rows]

    scores = bisect_failures(range(count), attempt)
    assert scores == {row: 10.0 * row for row in range(count) if row not in bad}
    assert len(attempts) <= max(1, 2 * count - 1)
    assert len(attempts) <= 1 + 2 * len(bad) * math.ceil(math.log2(max(2, count)))


def test_halves_end_when_told():
    attempts = []
    bisect_failures(range(64), attempts.append, lambda: len(attempts) < 3)
    assert len(attempts) == 3
