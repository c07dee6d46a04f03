"""The contract of docs/estimators/index.md, for every registered estimator: a new one is tested without a change here.

Properties that an estimator documents not to have are listed in `EXCEPTIONS`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tealightning.estimators import build_estimator, estimator_names

pytestmark = pytest.mark.filterwarnings("ignore:.*the tail has 2 rollouts:UserWarning")

CONFIGURATIONS: list[tuple[str, dict]] = [(name, {}) for name in estimator_names()] + [
    ("mean_reward", {"baseline": "none"}),
    ("mean_reward", {"baseline": "loo"}),
    ("max_at_k", {"k": 1}),
    ("max_at_k", {"k": 3}),
    ("max_at_k", {"k": 3, "baseline": "none"}),
    ("direct", {"target_n": 4096, "alpha": 0.5}),
    ("direct", {"target_n": 1, "alpha": 1.0}),
    ("tea", {"scale": "none"}),
    ("tea", {"scale": "none", "baseline": "loo"}),
    ("tea", {"scale": "reward_std", "baseline": "mean"}),
    ("tea", {"scale": "rms"}),
    ("tea", {"scale": "rms", "baseline": "loo"}),
    ("prefix_tea", {"rotations": 1, "order": 3, "alpha": 0.5}),
]

ORDERED = "ordered"  # depends on the order of the rollouts
NO_BASELINE = "no baseline"  # neither shift-invariant nor zero in a constant group
SCALE_FREE = "scale-free"  # A(s R) = A(R)
STANDARDISED = "standardised"  # neither that nor A(s R) = s A(R)


def exceptions(name: str, kwargs: dict) -> set[str]:
    """What this configuration documents not to keep."""
    found = set()
    if name == "prefix_tea":
        found.add(ORDERED)
    if kwargs.get("baseline") == "none" and name in ("mean_reward", "max_at_k"):
        found.add(NO_BASELINE)
    if name == "grpo":
        found.add(STANDARDISED)
    if name == "tea" and kwargs.get("scale") != "none":
        found.add(SCALE_FREE)
    return found


each = pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS, ids=[f"{n}-{k}" for n, k in CONFIGURATIONS])


@st.composite
def groups(draw, width: int) -> Tensor:
    """[P, m] float64 on a grid of sixteenths, so that ties are common and shifts exact."""
    rows = st.lists(st.integers(-200, 200), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)), dtype=torch.float64) / 16


def widths(estimator) -> st.SearchStrategy[int]:
    smallest = max(2, estimator.min_group_size)
    return st.sampled_from(sorted({smallest, max(smallest, 12), max(smallest, 16)}))


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_symmetries(name, kwargs, data):
    estimator, known = build_estimator(name, **kwargs), exceptions(name, kwargs)
    width = data.draw(widths(estimator))
    rewards = data.draw(groups(width))
    advantages = estimator(rewards)
    if ORDERED not in known:
        order = torch.tensor(data.draw(st.permutations(range(width))))
        check(estimator(rewards[:, order]), advantages[:, order])
    if NO_BASELINE not in known:
        check(estimator(rewards + data.draw(st.sampled_from([-8.0, 0.5, 1000.0]))), advantages)
    if STANDARDISED not in known:
        scale = data.draw(st.sampled_from([0.25, 3.7, 100.0]))
        check(estimator(rewards * scale), advantages if SCALE_FREE in known else advantages * scale)
    check(estimator(torch.cat([rewards, rewards.flip(0)])), torch.cat([advantages, advantages.flip(0)]))


@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_invalid_rollouts_get_zero_and_take_no_part(name, kwargs, data):
    estimator = build_estimator(name, **kwargs)
    width = data.draw(widths(estimator))
    rewards = data.draw(groups(width))[:1]
    kept = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
    valid = torch.tensor([kept])
    advantages = estimator(rewards, valid)
    unscorable = rewards.masked_fill(~valid, float("nan"))
    assert torch.equal(estimator(unscorable), advantages)
    assert torch.equal(estimator(unscorable, torch.ones_like(valid)), advantages)
    assert (advantages[~valid] == 0).all()
    if sum(kept) >= estimator.min_group_size:
        check(advantages[valid][None], estimator(rewards[valid][None]))
    else:
        assert (advantages == 0).all()


@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_finite_rewards_give_finite_advantages(name, kwargs, data):
    estimator = build_estimator(name, **kwargs)
    width = max(2, estimator.min_group_size, 12)
    values = st.floats(-1e100, 1e100) | st.sampled_from([0.0, 1e-300, 5e-324, 0.1, 0.1 + 2**-56])
    rewards = torch.tensor([data.draw(st.lists(values, min_size=width, max_size=width))], dtype=torch.float64)
    assert torch.isfinite(estimator(rewards)).all()


@each
@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e300])
def test_extreme_magnitudes_keep_the_shape_of_the_advantages(name, kwargs, magnitude):
    estimator, known = build_estimator(name, **kwargs), exceptions(name, kwargs)
    rewards = torch.randn(4, max(estimator.min_group_size, 16), generator=torch.Generator().manual_seed(0)).double()
    advantages = estimator(rewards * magnitude)
    assert torch.isfinite(advantages).all()
    if STANDARDISED not in known:
        check(advantages if SCALE_FREE in known else advantages / magnitude, estimator(rewards))


@each
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 + 0.1, 1e-300])
def test_constant_groups_give_exact_zeros(name, kwargs, value):
    estimator, known = build_estimator(name, **kwargs), exceptions(name, kwargs)
    for width in {max(2, estimator.min_group_size), 12, 16, 49} - set(range(estimator.min_group_size)):
        for dtype in (torch.float64, torch.float32):
            advantages = estimator(torch.full((2, width), value, dtype=dtype))
            if NO_BASELINE in known:
                assert (advantages == advantages[0, 0]).all()
            else:
                assert (advantages == 0).all()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_has_the_dtype_and_shape_of_the_rewards(name, kwargs, dtype):
    estimator = build_estimator(name, **kwargs)
    width = max(estimator.min_group_size, 16)
    rewards = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = rewards.clone()
    advantages = estimator(rewards)
    assert advantages.dtype == dtype
    assert advantages.shape == rewards.shape
    assert torch.equal(rewards, before)
    assert torch.equal(advantages, estimator(rewards.double()).to(dtype))
    assert not estimator(rewards.clone().requires_grad_()).requires_grad


@each
def test_empty_and_unscorable_batches_give_zeros(name, kwargs):
    estimator = build_estimator(name, **kwargs)
    width = max(estimator.min_group_size, 16)
    assert estimator(torch.zeros(0, width)).shape == (0, width)
    assert (estimator(torch.full((2, width), float("nan"))) == 0).all()
    rewards = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    assert (estimator(rewards, torch.zeros(2, width, dtype=torch.bool)) == 0).all()


@each
def test_bad_input_is_a_value_error(name, kwargs):
    estimator = build_estimator(name, **kwargs)
    width = max(estimator.min_group_size, 16)
    with pytest.raises(ValueError, match="float tensor of shape"):
        estimator(torch.zeros(2, width, dtype=torch.int64))
    with pytest.raises(ValueError, match="float tensor of shape"):
        estimator(torch.zeros(width))
    with pytest.raises(ValueError, match="valid must have the shape"):
        estimator(torch.zeros(2, width), torch.ones(2, width - 1, dtype=torch.bool))
    if estimator.min_group_size > 1:
        small = estimator.min_group_size - 1
        with pytest.raises(ValueError, match=f"group_size={small}"):
            estimator(torch.zeros(2, small))
