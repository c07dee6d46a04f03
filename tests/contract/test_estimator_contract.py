"""The contract of docs/estimators/index.md, for every registered estimator: a new one is tested without a change here.

An estimator that documents not to have a property declares it in `DECLARED`; further arguments to test go to
`VARIANTS`. A declaration that is not needed fails, too.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tealightning.estimators import build_estimator, estimator_names

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the tail has 2 rollouts:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rewards hold values other than 0 and 1:UserWarning"),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One estimator with its arguments, and which properties it has."""

    name: str
    kwargs: dict = field(default_factory=dict)
    permutation_equivariant: bool = True  # A(permuted R) = permuted A(R)
    shift_invariant: bool = True  # A(R + c) = A(R)
    scaling: Literal["equivariant", "invariant", "neither"] = "equivariant"  # A(s R) = s A(R); A(s R) = A(R)
    zero_in_constant_groups: bool = True  # else equal within the group
    negative_rewards: bool = True  # else refused: such an estimator is tested on absolute values

    def __str__(self) -> str:
        return f"{self.name}-{self.kwargs}"

    def build(self):
        return build_estimator(self.name, **self.kwargs)

    def fit(self, rewards: Tensor) -> Tensor:
        """Rewards that it takes."""
        return rewards if self.negative_rewards else rewards.abs()


NO_BASELINE = {"shift_invariant": False, "zero_in_constant_groups": False}
THRESHOLDED = {"shift_invariant": False, "scaling": "neither"}

DECLARED: dict[str, dict] = {
    "cat_bon": {"scaling": "invariant"},
    "entropic": {"scaling": "invariant"},
    "grpo": {"scaling": "neither"},
    "grpo_lead": THRESHOLDED,
    "infalign": {"scaling": "invariant"},
    "max_rl": {"shift_invariant": False, "scaling": "neither", "negative_rewards": False},
    "pass_at_n": THRESHOLDED,
    "prefix_tea": {"permutation_equivariant": False},
    "rs_grpo": {"scaling": "neither"},
    "tea": {"scaling": "invariant"},
}

VARIANTS: list[tuple[str, dict, dict]] = [  # name, arguments, what differs from the declaration
    ("mean_reward", {"baseline": "none"}, NO_BASELINE),
    ("mean_reward", {"baseline": "loo"}, {}),
    ("max_at_k", {"k": 1}, {}),
    ("max_at_k", {"k": 3}, {}),
    ("max_at_k", {"k": 3, "baseline": "none"}, NO_BASELINE),
    ("max_at_k", {"scale": "group_std"}, {"scaling": "invariant"}),
    ("max_at_k", {"k": 1, "scale": "group_std"}, {"scaling": "invariant"}),
    ("max_at_k", {"k": 8, "scale": "group_std"}, {"scaling": "invariant"}),
    ("max_at_k", {"k": 3, "scale": "group_std", "baseline": "none"}, {"scaling": "invariant"}),
    ("max_rl", {"eps": 0.5}, {}),
    ("rs_grpo", {"beta": 0.01}, {}),
    ("rs_grpo", {"beta": 5.0, "eps": 1.0}, {}),
    ("chow_bon_rl", {"baseline": "none"}, NO_BASELINE),
    ("cat_bon", {"target_n": 4096}, {}),
    ("cat_bon", {"target_n": 1}, {}),
    ("entropic", {"kl_target": 2.0}, {}),
    ("entropic", {"beta": 2.0}, {"scaling": "neither"}),
    ("infalign", {"tilt": 1000.0}, {}),
    ("grpo_lead", {"threshold": -1.0, "low": 0.0, "high": 3.0}, {}),
    ("pass_at_n", {"baseline": "loo"}, {}),
    ("pass_at_n", {"target_n": 4, "prior_successes": 0.5}, {}),
    ("direct", {"target_n": 4096, "alpha": 0.5}, {}),
    ("direct", {"target_n": 1, "alpha": 1.0}, {}),
    ("tea", {"scale": "none"}, {"scaling": "equivariant"}),
    ("tea", {"scale": "none", "baseline": "loo"}, {"scaling": "equivariant"}),
    ("tea", {"scale": "reward_std", "baseline": "mean"}, {}),
    ("tea", {"scale": "rms"}, {}),
    ("tea", {"scale": "rms", "baseline": "loo"}, {}),
    ("prefix_tea", {"rotations": 1, "order": 3, "alpha": 0.5}, {}),
    ("direct", {"tail": "gpd"}, {}),
    ("direct", {"tail": "empirical"}, {}),
    ("tea", {"tail": "gpd", "scale": "none"}, {"scaling": "equivariant"}),
    ("tea", {"tail": "empirical"}, {}),
    ("prefix_tea", {"tail": "empirical"}, {}),
    ("calibrated_tea", {"alpha": 0.5}, {}),
    ("optimal_tea", {"alpha": 0.5}, {}),
]

DEFAULTS = [Case(name=name, **DECLARED.get(name, {})) for name in estimator_names()]
CASES = DEFAULTS + [
    replace(Case(name=name, kwargs=kwargs, **DECLARED.get(name, {})), **differs) for name, kwargs, differs in VARIANTS
]

each = pytest.mark.parametrize("case", CASES, ids=str)
few_examples = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def groups(draw, width: int) -> Tensor:
    """[P, m] float64 on a grid of sixteenths, so that ties are common and shifts exact."""
    rows = st.lists(st.integers(-200, 200), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)), dtype=torch.float64) / 16


def widths(estimator) -> st.SearchStrategy[int]:
    smallest = max(2, estimator.min_group_size)
    return st.sampled_from(sorted({smallest, max(smallest, 12), max(smallest, 16)}))


TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def same(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, **TOLERANCE)


@each
@few_examples
@given(data=st.data())
def test_symmetries(case, data):
    estimator = case.build()
    width = data.draw(widths(estimator))
    rewards = case.fit(data.draw(groups(width)))
    advantages = estimator(rewards)
    if case.permutation_equivariant:
        order = torch.tensor(data.draw(st.permutations(range(width))))
        check(estimator(rewards[:, order]), advantages[:, order])
    if case.shift_invariant:
        check(estimator(rewards + data.draw(st.sampled_from([-8.0, 0.5, 1000.0]))), advantages)
    if case.scaling != "neither":
        scale = data.draw(st.sampled_from([0.25, 3.7, 100.0]))
        check(estimator(rewards * scale), advantages if case.scaling == "invariant" else advantages * scale)
    check(estimator(torch.cat([rewards, rewards.flip(0)])), torch.cat([advantages, advantages.flip(0)]))


@each
@few_examples
@given(data=st.data())
def test_invalid_rollouts_get_zero_and_take_no_part(case, data):
    estimator = case.build()
    width = data.draw(widths(estimator))
    rewards = case.fit(data.draw(groups(width))[:1])
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
@few_examples
@given(data=st.data())
def test_finite_rewards_give_finite_advantages(case, data):
    estimator = case.build()
    width = max(2, estimator.min_group_size, 12)
    values = st.floats(-1e100, 1e100) | st.sampled_from([0.0, 1e-300, 5e-324, 0.1, 0.1 + 2**-56])
    rewards = torch.tensor([data.draw(st.lists(values, min_size=width, max_size=width))], dtype=torch.float64)
    rewards = case.fit(rewards)
    assert torch.isfinite(estimator(rewards)).all()


@each
@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e300])
def test_extreme_magnitudes_keep_the_shape_of_the_advantages(case, magnitude):
    estimator = case.build()
    rewards = torch.randn(4, max(estimator.min_group_size, 16), generator=torch.Generator().manual_seed(0)).double()
    rewards = case.fit(rewards)
    advantages = estimator(rewards * magnitude)
    assert torch.isfinite(advantages).all()
    if case.scaling != "neither":
        check(advantages if case.scaling == "invariant" else advantages / magnitude, estimator(rewards))


@each
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 + 0.1, 1e-300])
def test_constant_groups_give_exact_zeros(case, value):
    estimator = case.build()
    for width in {max(2, estimator.min_group_size), 12, 16, 49} - set(range(estimator.min_group_size)):
        for dtype in (torch.float64, torch.float32):
            advantages = estimator(case.fit(torch.full((2, width), value, dtype=dtype)))
            assert (advantages == (0 if case.zero_in_constant_groups else advantages[0, 0])).all()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_has_the_dtype_and_shape_of_the_rewards(case, dtype):
    estimator = case.build()
    width = max(estimator.min_group_size, 16)
    rewards = case.fit(torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype))
    before = rewards.clone()
    advantages = estimator(rewards)
    assert advantages.dtype == dtype
    assert advantages.shape == rewards.shape
    assert torch.equal(rewards, before)
    assert torch.equal(advantages, estimator(rewards.double()).to(dtype))
    assert not estimator(rewards.clone().requires_grad_()).requires_grad


@each
def test_empty_and_unscorable_batches_give_zeros(case):
    estimator = case.build()
    width = max(estimator.min_group_size, 16)
    assert estimator(torch.zeros(0, width)).shape == (0, width)
    assert (estimator(torch.full((2, width), float("nan"))) == 0).all()
    rewards = case.fit(torch.randn(2, width, generator=torch.Generator().manual_seed(0)))
    assert (estimator(rewards, torch.zeros(2, width, dtype=torch.bool)) == 0).all()


@each
def test_bad_input_is_a_value_error(case):
    estimator = case.build()
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


@each
def test_rewards_that_are_refused_are_told(case):
    rewards = torch.randn(2, max(case.build().min_group_size, 16), generator=torch.Generator().manual_seed(0))
    if case.negative_rewards:
        case.build()(rewards)
        return
    with pytest.raises(
        ValueError, match=rf"{case.name} takes rewards of at least 0, got {float(rewards.min()):.4g}: \w"
    ):
        case.build()(rewards)
    invalid = case.build()(rewards, rewards >= 0)  # what could not be scored is not looked at
    assert torch.isfinite(invalid).all()


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_declared_names_are_estimators(name):
    assert name in estimator_names()


@each
def test_nothing_is_declared_that_does_not_hold(case):
    """An exemption that the estimator no longer needs would hide the day when the property breaks."""
    estimator = case.build()
    width = max(estimator.min_group_size, 16)
    rewards = case.fit(torch.randn(8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    advantages = estimator(rewards)
    assert advantages.abs().max() > 0
    if not case.permutation_equivariant:
        assert not same(estimator(rewards.roll(1, 1)), advantages.roll(1, 1))
    if not case.shift_invariant:
        assert not same(estimator(rewards + 1), advantages)
    if case.scaling != "invariant":
        assert not same(estimator(rewards * 3), advantages)
    if case.scaling == "neither":
        assert not same(estimator(rewards * 3), advantages * 3)
    if not case.zero_in_constant_groups:
        assert estimator(torch.ones(1, width)).abs().max() > 0
