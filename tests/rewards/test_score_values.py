"""What a user's code may return as scores, what is refused, and what becomes of whatever it raises."""

import array
import collections
import decimal
import fractions
import itertools
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import reward_functions
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playground_fits import fit

from tealightning.rewards import FunctionReward, Reward, RewardScores, WeightedReward
from tealightning.rewards.base import RewardExitError, as_scores, checked_scores
from tealightning.rewards.function import FunctionRaisedError
from tealightning.rewards.user_function import NoScoresError, read_scores

NAN = float("nan")
HUGE = 10**5000


def returning(value, **keywords) -> FunctionReward:
    """A reward whose function, `judge`, returns `value`; a callable is called with the completions."""

    def judge(prompts, completions, metadata):
        return value(completions) if callable(value) else value

    return FunctionReward(judge, **keywords)


def call(reward, count=3):
    return checked_scores(reward, ["p"] * count, [f"c{i}" for i in range(count)], [{}] * count)


def same(scores: torch.Tensor, expected: list[float]) -> bool:
    return scores.dtype == torch.float64 and np.array_equal(scores.numpy(), np.array(expected), equal_nan=True)


ACCEPTED = {
    "list": [1, 2.5, None],
    "tuple": (True, np.float32(2.5), NAN),
    "deque": collections.deque([1, 2.5, None]),
    "generator": lambda c: (x for x in [1, 2.5, None]),
    "map": lambda c: map(float, [1, 2.5, NAN]),
    "dict_values": {"a": 1, "b": 2.5, "c": None}.values(),
    "array.array": array.array("d", [1, 2.5, NAN]),
    "numpy": np.array([1, 2.5, NAN], dtype=np.float16),
    "numpy objects": np.array([1, decimal.Decimal("2.5"), None], dtype=object),
    "numpy masked": np.ma.array([1, 2.5, 9], mask=[False, False, True]),
    "numpy long double": np.array([1, 2.5, NAN], dtype=np.longdouble),
    "exact numbers": [fractions.Fraction(1), decimal.Decimal("2.5"), decimal.Decimal("NaN")],
    "tensor": torch.tensor([1, 2.5, NAN], dtype=torch.bfloat16, requires_grad=True),
    "column": torch.tensor([[1, 2.5], [2.5, 0], [NAN, 0]]).T[0],
    "list of tensors": [torch.tensor(1), torch.tensor(2.5, requires_grad=True), torch.tensor([NAN])],
    "series": pd.Series([1, 2.5, None], index=[2, 0, 1]),
    "nullable series": pd.Series([1, 2.5, pd.NA], dtype="Float64", index=["c", "b", "a"]),
    "pandas array": pd.array([1, 2.5, pd.NA]),
    "pyarrow": pa.array([1, 2.5, None]),
    "mapping": {2: None, 0: 1, 1: 2.5},
    "mapping with numpy keys": collections.OrderedDict([(np.int64(1), 2.5), (np.int64(0), 1), (np.int64(2), None)]),
}


@pytest.mark.parametrize("value", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("on_error", ["raise", "unscored"])
def test_numbers_in_order_are_scores_whatever_holds_them(value, on_error):
    value = value if on_error == "raise" or not isinstance(value, types.GeneratorType) else list(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = call(returning(value, on_error=on_error))
    assert same(scores.total, [1.0, 2.5, NAN])
    assert on_error == "raise" or scores.counts["judge"]["errors"] == 0


REFUSED = {
    "set": ({1.0, 2.0, 3.0}, "set"),
    "frozenset": (frozenset([1.0, 2.0, 3.0]), "frozenset"),
    "mapping by name": ({"a": 1.0, "b": 2.0, "c": 3.0}, "keys of a mapping must be 0, 1, .*'a'"),
    "mapping from 1": ({1: 1.0, 2: 2.0, 3: 3.0}, r"must be 0, 1, .*\[1, 2, 3\]"),
    "mapping by score": ({0.5: 0, 0.7: 1, 0.9: 2}, r"must be 0, 1, .*0\.5"),
    "mapping by truth": ({False: 1.0, True: 2.0}, "must be 0, 1"),
    "mapping that lacks one": ({0: 1.0, 1: 2.0}, r"3 values, one per completion, got shape \(2,\)"),
    "text": ("123", "'123'"),
    "bytes": (b"123", "bytes"),
    "bytearray": (bytearray(b"123"), "bytearray"),
    "memoryview": (memoryview(b"123"), "memoryview"),
    "nothing": (None, "None"),
    "one number": (5.0, r"5\.0"),
    "one tensor": (torch.tensor(5.0), r"3 values, one per completion, got shape \(\)"),
    "coroutine": (lambda c: [asyncio_like() for _ in c], "coroutine"),
    "matrix": (np.ones((3, 1)), r"3 values, one per completion, got shape \(3, 1\)"),
    "logits": (torch.ones(3, 1), r"3 values, one per completion, got shape \(3, 1\)"),
    "data frame": (pd.DataFrame({"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3]}), r"\(3, 3\)"),
    "arrow table": (pa.table({"a": [1, 2, 3]}), r"\(3, 1\)"),
    "too few": ([1.0], r"3 values, one per completion, got shape \(1,\)"),
    "too many": ([1.0] * 4, r"got shape \(4,\)"),
    "without end": (lambda c: itertools.count(), "3 values, one per completion, got more"),
    "complex": (np.ones(3, dtype=complex), "ndarray"),
    "complex tensor": (torch.ones(3, dtype=torch.complex64), "Tensor"),
    "dates": (np.array(["2020-01-01"] * 3, dtype="datetime64[ns]"), "ndarray"),
    "durations": (pd.Series(pd.to_timedelta([1, 2, 3])), "Series"),
    "sparse": (torch.ones(3).to_sparse(), "cannot be read"),
}


async def asyncio_like():
    return 1.0


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_not_one_number_per_completion_is_refused_with_the_functions_name(value, message):
    with pytest.raises(ValueError, match=f"(?s)reward 'judge' must return .*{message}"):
        call(returning(value))
    with pytest.warns(UserWarning, match="reward 'judge' must return"):
        scores = call(returning(value, on_error="unscored"))
    assert scores.counts["judge"]["errors"] > 0


class Odd:
    def __float__(self):
        raise SystemExit(0)

    __repr__ = __float__


class NotANumber:
    def __float__(self):
        return "7"


NO_NUMBERS = {
    "text": "1.0",
    "numpy text": np.str_("1.0"),
    "bytes": b"1",
    "complex": 1 + 0j,
    "numpy complex": np.complex64(1),
    "complex tensor": torch.tensor(1 + 0j),
    "list": [1.0],
    "dict": {"score": 1.0},
    "too large": 10**400,
    "more digits than Python prints": HUGE,
    "date": pd.Timestamp("2020-01-01"),
    "no time": pd.NaT,
    "numpy date": np.datetime64("2020-01-01"),
    "duration": np.timedelta64(5, "s"),
    "signalling NaN": decimal.Decimal("sNaN"),
    "tensor of several": torch.ones(2),
    "exits": Odd(),
    "is no number after all": NotANumber(),
    "object": object(),
}


@pytest.mark.parametrize("element", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_element_that_is_no_number_costs_its_completion_or_ends_the_run_with_an_error(element):
    calls = []

    def judge(prompts, completions, metadata):
        calls.append(len(completions))
        return [1.0, element, 3.0]

    with pytest.raises(ValueError, match=r"reward 'judge' must return one number per completion .*value 1 is "):
        call(FunctionReward(judge))
    with pytest.warns(UserWarning, match="'judge' has no score for 1 completions: .*value 1 is "):
        scores = call(FunctionReward(judge, on_error="unscored"))
    assert same(scores.total, [1.0, NAN, 3.0])
    assert scores.counts["judge"] == {"timeouts": 0, "crashes": 0, "errors": 1, "unscored": 1}
    assert calls == [3, 3]  # the others need not be scored again


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.none() | st.booleans() | st.integers() | st.floats() | st.decimals(allow_nan=False) | st.fractions(),
        max_size=6,
    ),
    kind=st.sampled_from([list, tuple, iter, collections.deque, lambda v: dict(enumerate(v)), pd.Series]),
    count=st.integers(0, 6),
)
def test_scores_are_the_values_in_order_or_refused(values, kind, count):
    expected = [NAN if value is None else float(value) for value in values]
    made = pd.Series(values, dtype=object, index=range(len(values), 0, -1)) if kind is pd.Series else kind(values)
    if len(values) == count:
        scores, problems = read_scores(made, count)
        assert np.array_equal(np.array(scores), np.array(expected), equal_nan=True) and not problems
    else:
        with pytest.raises(NoScoresError, match=f"must return {count} values"):
            read_scores(made, count)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.sets(st.integers()) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(value=ANYTHING, count=st.integers(0, 4))
def test_anything_gives_as_many_floats_or_a_message_with_the_name(value, count):
    try:
        scores = as_scores(value, expected=count, source="reward 'judge'")
    except ValueError as error:
        assert str(error).startswith("reward 'judge' must return ")
    else:
        assert scores.shape == (count,) and scores.dtype == torch.float64
        assert not isinstance(value, str | bytes | set)


# ---------------------------------------------------------------- what user code raises


class Silent(Exception):
    def __str__(self):
        raise KeyError("no message")


EXCEPTIONS = [
    *(kind("told") for kind in (ValueError, TypeError, KeyError, StopIteration, MemoryError, RecursionError, OSError)),
    *(ArithmeticError(), NotImplementedError(), AssertionError(), UnicodeError("x"), SyntaxError("x"), Silent()),
    *(SystemExit(0), SystemExit(None), SystemExit("text"), GeneratorExit(), BaseException("bare")),
    BaseExceptionGroup("several", [SystemExit(0)]),
]
PLACES = ["call", "iteration", "coroutine"]


def raising(error, place):
    def fail(completions):
        if "c1" in completions:
            raise error

    def judge(prompts, completions, metadata):
        fail(completions)
        return [1.0] * len(completions)

    def judged(completions):
        yield from [1.0] * (len(completions) - 1)
        fail(completions)
        yield 1.0

    async def judge_async(prompts, completions, metadata):
        fail(completions)
        return [1.0] * len(completions)

    return {"call": judge, "coroutine": judge_async, "iteration": lambda **of: judged(of["completions"])}[place]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda e: f"{type(e).__name__}-{e.args}")
def test_what_user_code_raises_is_its_completions_fault(error, place):
    function = raising(error, place)
    name = function.__name__
    with pytest.raises(FunctionRaisedError, match=rf"reward function '{name}' raised \w+ on 3 completions") as caught:
        call(FunctionReward(function))
    assert caught.value.__cause__ is not None
    with pytest.warns(UserWarning, match=rf"'{name}' has no score for 1 completions: .* raised \w+ on 1 completions"):
        scores = call(FunctionReward(function, on_error="unscored"))
    assert same(scores.total, [1.0, NAN, 1.0])
    assert scores.counts[name]["unscored"] == 1


@pytest.mark.parametrize("place", PLACES)
def test_interrupt_of_the_keyboard_ends_the_run(place):
    with pytest.raises(KeyboardInterrupt):
        call(FunctionReward(raising(KeyboardInterrupt(), place), on_error="unscored"))


@pytest.mark.parametrize("on_error", ["raise", "unscored"])
def test_worker_process_outlives_an_exit_of_the_function(on_error):
    reward = FunctionReward(f"{reward_functions.__file__}:misbehaving", timeout_seconds=60.0, on_error=on_error)
    arguments = (["p"] * 2, ["a", "<sys.exit>"], [{}] * 2)
    if on_error == "raise":
        with pytest.raises(
            FunctionRaisedError, match="'misbehaving' raised SystemExit on 2 completions: no more of this"
        ):
            checked_scores(reward, *arguments)
    else:
        with pytest.warns(UserWarning, match="raised SystemExit"):
            scores = checked_scores(reward, *arguments)
        assert scores.counts["misbehaving"] == {"timeouts": 0, "crashes": 0, "errors": 2, "unscored": 1}
    reward.close()


def test_script_that_exits_when_imported_is_refused(tmp_path: Path):
    (tmp_path / "script.py").write_text("import sys\ndef f(**_): ...\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"script\.py calls sys\.exit\(0\) when it is imported"):
        FunctionReward(f"{tmp_path}/script.py:f")


# ---------------------------------------------------------------- classes of users


class Scored(Reward):
    """Returns, or does, what it is given."""

    def __init__(self, made):
        self.made = made

    def score(self, prompts, completions, metadata):
        return self.made(completions)


class Called(Scored):
    def __call__(self, prompts, completions, metadata):
        return self.made(completions)


def leave(completions):
    sys.exit(0)


async def later(completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize("kind", [Scored, Called])
@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: WeightedReward({"one": r}, {"one": 1.0})])
def test_exit_of_a_reward_class_is_an_error_with_its_name(kind, wrap):
    with pytest.raises(RewardExitError, match="scoring 3 completions, raised SystemExit: 0"):
        call(wrap(kind(leave)))


@pytest.mark.parametrize("made", [later, lambda c: {"a": 1.0}, lambda c: "abc", lambda c: torch.ones(3, 1), set])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_a_class_returns_is_held_to_the_same_contract(made):
    with pytest.raises(ValueError, match="reward 'scored' must return"):
        call(Scored(made))
    with pytest.raises(ValueError, match="reward 'called' must return RewardScores when it is called, got"):
        call(Called(made))


def scores_of(total, **components):
    return lambda completions: RewardScores(total=total, components=components)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (scores_of(torch.ones(2)), r"'called' must return 3 values, one per completion, got shape \(2,\)"),
        (scores_of(torch.ones(3, 1)), r"'called' must return 3 values.*\(3, 1\)"),
        (scores_of(torch.ones(3), style=torch.ones(1, 3)), r"'called', component 'style', must return 3 .*\(1, 3\)"),
    ],
)
def test_wrong_shape_of_scores_of_a_class_is_named(made, message):
    with pytest.raises(ValueError, match=message):
        call(Called(made))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_scores_of_a_class_become_float64_without_gradient(dtype):
    values = torch.tensor([1, 0, 1], dtype=dtype).requires_grad_(dtype.is_floating_point)
    scores = call(Called(scores_of(values, part=values)))
    assert same(scores.total, [1.0, 0.0, 1.0]) and not scores.total.requires_grad
    assert same(scores.components["part"], [1.0, 0.0, 1.0])


@pytest.mark.parametrize("change", [list.clear, list.sort, list.reverse, list.pop])
def test_function_that_changes_its_arguments_misplaces_nothing(change):
    def sorts(prompts, completions, metadata):
        values = [float(c[1:]) for c in completions]
        change(completions)
        change(prompts)
        return values

    completions = ["c3", "c1", "c2"]
    scores = checked_scores(FunctionReward(sorts), ["p"] * 3, completions, [{}] * 3)
    assert scores.total.tolist() == [3.0, 1.0, 2.0] and completions == ["c3", "c1", "c2"]


def test_scores_are_kept_when_the_function_uses_its_array_again():
    buffer = torch.zeros(3, dtype=torch.float64)
    reward = FunctionReward(lambda prompts, completions, metadata: buffer.add_(1.0))
    first = call(reward).total
    call(reward)
    assert first.tolist() == [1.0] * 3


@pytest.mark.parametrize("score_as_finished", [False, True])
def test_exit_in_a_reward_does_not_end_a_run_as_done(playground: Path, score_as_finished):
    for reward, error in ((Scored(leave), RewardExitError), (lambda **_: sys.exit(0), FunctionRaisedError)):
        with pytest.raises(error, match="raised SystemExit"):
            fit(playground, steps=2, reward=reward, rollout={"score_as_finished": score_as_finished})
