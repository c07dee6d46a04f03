import math

import pytest
import torch

from tealightning.functional.tail_checks import tie_cause, tied


def scores(seed=0, *, mean=0.0, std=1.0, shape=(8, 16)):
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cause(rewards):
    rewards = rewards.double()
    return tie_cause(rewards, tied(rewards, []))


def test_tied_is_the_same_reward_for_another_text_of_the_same_prompt():
    rewards = torch.tensor([[1.0, 1.0, 2.0], [1.0, 3.0, 3.0]])
    assert tied(rewards, ["a", "b", "c", "a", "d", "d"]).tolist() == [[True, True, False], [False, False, False]]
    assert tied(rewards, []).tolist() == [[True, True, False], [False, True, True]]


def test_tied_leaves_unscorable_rewards_out():
    rewards = torch.tensor([[math.nan, math.nan, 1.0]])
    assert not tied(rewards, ["a", "b", "c"]).any()
    assert tie_cause(rewards, tied(rewards, ["a", "b", "c"])) is None


@pytest.mark.parametrize("mean", [-3.0, 10.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_rounded_to_half_precision_are_told_by_their_type(mean, dtype):
    std = 8 * 2.0 ** (math.floor(math.log2(abs(mean))) - (7 if dtype == torch.bfloat16 else 10))  # 8 steps wide
    assert cause(scores(mean=mean, std=std).to(dtype)) == str(dtype).removeprefix("torch.")
    assert cause(scores(mean=mean, std=std).float()) is None


def test_clipped_and_saturated_scores_share_the_highest_one():
    """OpenRLHF clips rewards to +-10 and verl applies a sigmoid unless told otherwise: the upper tail is gone."""
    raw = scores(mean=9.0, std=2.0)
    assert cause(raw) is None
    assert cause(raw.clamp(-10, 10)) == "ceiling"
    assert cause((2 * raw).float().sigmoid()) == "float32"  # 1 - 2**-24 and its neighbours
    assert cause(scores(mean=16.6, std=0.3).float().sigmoid()) == "float32"  # these two only


def test_rounded_decimals_are_a_grid():
    assert cause((scores() * 10).round() / 10) == "grid"


@pytest.mark.parametrize(
    "rewards",
    [
        (scores() > 0),  # right or wrong
        (scores(std=20.0)).round(),  # points
        200 + scores(std=10.0).round().clamp(-50, 50),  # lengths
        (scores() * 2).round().clamp(0, 4) / 4,  # a rubric
        scores(),
    ],
)
def test_scores_that_are_meant_to_be_equal_have_no_cause(rewards):
    assert cause(rewards) is None
