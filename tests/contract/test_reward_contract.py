"""What every registered reward promises. A new reward needs one line in `BUILDERS`; the test says so if it lacks it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import reward_functions
import torch
from reward_server import reward_server

from tealightning.registry import snake_case
from tealightning.rewards import (
    FunctionReward,
    HTTPReward,
    Reward,
    SequenceClassifierReward,
    build_reward,
    reward_names,
)
from tealightning.rewards.base import REWARDS, as_scores

PROMPTS = ["Return the", "Once upon", "Return the"]
COMPLETIONS = [" value of x", "", " sum"]
METADATA = [{"answer": "x"}, {}, {"answer": "y"}]
SERVER = SimpleNamespace(url="")
OURS = [name for name in reward_names() if REWARDS.get(name).__module__.startswith("tealightning.")]


def count_words(prompts, completions, metadata):
    return [float(len(c.split())) for c in completions]


def classifier(playground: Path) -> SequenceClassifierReward:
    return SequenceClassifierReward(model=str(playground / "reward_model"))


BUILDERS: dict[str, Callable[[Path], Reward]] = {
    "sequence_classifier_reward": classifier,
    "function_reward": lambda _: FunctionReward(function=count_words),
    "weighted_reward": lambda playground: build_reward(
        "weighted_reward",
        rewards={"quality": classifier(playground), "words": FunctionReward(count_words)},
        weights={"quality": 1.0, "words": 0.5},
    ),
    "http_reward": lambda _: HTTPReward(SERVER.url),
    # Other settings of one, beside those that every registered reward must have here.
    "function_reward in a worker process": lambda _: FunctionReward(reward_functions.scores, timeout_seconds=60.0),
}


@pytest.fixture(scope="module", autouse=True)
def server():
    with reward_server() as started:
        SERVER.url = started.url
        yield


@pytest.fixture(params=sorted({*OURS, *BUILDERS}))
def reward(request: pytest.FixtureRequest, playground: Path):
    assert request.param in BUILDERS, f"add a builder of {request.param} to BUILDERS"
    built = BUILDERS[request.param](playground)
    built.setup(torch.device("cpu"))
    yield built
    built.close()


def test_reward_gives_a_finite_float64_score_per_completion(reward: Reward):
    scores = reward(PROMPTS, COMPLETIONS, METADATA)
    assert scores.total.shape == (3,)
    assert torch.isfinite(scores.total).all()
    for values in [scores.total, *scores.components.values()]:
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert not values.requires_grad
        assert values.shape == (3,)
    assert scores.components


def test_reward_depends_on_prompt_and_completion_not_on_the_batch(reward: Reward):
    together = reward(PROMPTS, COMPLETIONS, METADATA).total
    backwards = reward(PROMPTS[::-1], COMPLETIONS[::-1], METADATA[::-1]).total
    alone = torch.cat([reward([p], [c], [m]).total for p, c, m in zip(PROMPTS, COMPLETIONS, METADATA, strict=True)])
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert len(together.unique()) == 3


def test_reward_leaves_its_arguments_and_the_random_numbers_alone(reward: Reward):
    prompts, completions, metadata = list(PROMPTS), list(COMPLETIONS), [dict(m) for m in METADATA]
    state = torch.get_rng_state()
    reward(prompts, completions, metadata)
    assert (prompts, completions, metadata) == (PROMPTS, COMPLETIONS, METADATA)
    assert torch.equal(torch.get_rng_state(), state)


def test_reward_scores_nothing_as_nothing(reward: Reward):
    assert reward([], [], []).total.shape == (0,)


def test_reward_may_be_set_up_and_closed_twice(reward: Reward):
    before = reward(PROMPTS, COMPLETIONS, METADATA).total
    reward.setup(torch.device("cpu"))
    assert torch.equal(reward(PROMPTS, COMPLETIONS, METADATA).total, before)
    reward.close()
    reward.close()
    reward.setup(torch.device("cpu"))
    assert torch.equal(reward(PROMPTS, COMPLETIONS, METADATA).total, before)


def test_reward_is_known_by_the_name_of_its_class(reward: Reward):
    name = snake_case(type(reward).__name__)
    assert REWARDS.get(name) is REWARDS.get(type(reward).__name__) is type(reward)
    assert reward.name.isidentifier()


def test_unknown_reward_and_parameter_name_the_valid_ones():
    with pytest.raises(ValueError, match=r"Unknown reward 'funtion_reward'. Did you mean 'function_reward'"):
        build_reward("funtion_reward")
    with pytest.raises(ValueError, match=r"'FunctionReward' has no parameter 'fn'. Its parameters: function"):
        build_reward("FunctionReward", fn=count_words)


@pytest.mark.parametrize("values", [torch.tensor([1.0, float("nan")]), [1, None], (1.0, float("nan"))])
def test_scores_of_any_kind_become_float64_with_nan_for_unscorable(values):
    scores = as_scores(values, expected=2, source="reward 'x'")
    assert scores.dtype == torch.float64
    assert scores[0] == 1 and torch.isnan(scores[1])
