"""pass@N: what it pays, and its expectation for Bernoulli rewards by enumeration and by the binomial sum."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom

from tealightning.estimators import PassAtN
from tealightning.functional.binary import pass_at_n_weights

loo_weights = partial(pass_at_n_weights, baseline="loo")

UNIFORM = {"prior_successes": 1.0, "prior_failures": 1.0}


def expected_factor(m: int, target_n: int, p: float) -> float:
    """E[N E[(1-p)^(N-1) | others]] over the m - 1 others, uniform prior: sum over their number of successes."""
    paid = pass_at_n_weights(torch.ones(m, m, dtype=torch.float64).tril(), target_n, **UNIFORM)[:, 0]
    return float(binom.pmf(np.arange(m), m - 1, p) @ paid.numpy())


def moments(weights, m: int, target_n: int, p: float) -> tuple[float, float]:
    """E[(1/m) sum_i A_i S_i] with the score S = R - p of a logit, and E[A^2], over all 2^m groups."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * m)
    probabilities = (groups * p + (1 - groups) * (1 - p)).prod(1)
    advantages = weights(groups, target_n, **UNIFORM)
    gradient = (advantages * (groups - p)).mean(1)
    return (probabilities @ gradient).item(), (probabilities @ advantages.square().mean(1)).item()


def test_pass_at_n_by_hand():
    """One success beside three failures: 2 E[1-p] with p ~ Beta(1, 4) is 8/5."""
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert PassAtN(target_n=2)(rewards).tolist() == [[0.0, 8 / 5, 0.0, 0.0]]
    expected = torch.tensor([[-2 / 5, 8 / 5, -2 / 5, -2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(PassAtN(target_n=2, baseline="loo")(rewards), expected)


@pytest.mark.parametrize(("m", "target_n", "p"), [(5, 3, 0.3), (6, 128, 0.05), (7, 2, 0.8)])
def test_pass_at_n_expects_the_factor_times_the_gradient_of_p(m, target_n, p):
    expected = expected_factor(m, target_n, p) * p * (1 - p)
    assert moments(pass_at_n_weights, m, target_n, p)[0] == pytest.approx(expected, rel=1e-12)
    assert moments(loo_weights, m, target_n, p)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("target_n", "p"), [(128, 0.02), (16, 0.1), (4, 0.5)])
def test_pass_at_n_approaches_the_true_gradient_as_groups_grow(target_n, p):
    truth = target_n * (1 - p) ** (target_n - 1)
    errors = [abs(expected_factor(m, target_n, p) / truth - 1) for m in (64, 256, 1024)]
    assert errors[0] > 1.5 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.2


def test_pass_at_n_cannot_tell_1_in_n_from_1_in_m_in_a_small_group():
    """The figures of the page."""
    assert expected_factor(16, 128, 0.02) == pytest.approx(10.9, abs=0.05)
    assert pytest.approx(9.8, abs=0.05) == 128 * 0.98**127
    assert expected_factor(16, 128, 0.1) == pytest.approx(3.5, abs=0.05)
    assert pytest.approx(0.0002, abs=0.00005) == 128 * 0.9**127


def test_pass_at_n_baseline_shrinks_advantages_where_successes_are_common():
    ratio = (moments(loo_weights, 8, 2, 0.8)[1] / moments(pass_at_n_weights, 8, 2, 0.8)[1]) ** 0.5
    assert ratio == pytest.approx(0.5, abs=0.005)
    rare = (moments(loo_weights, 8, 16, 0.05)[1] / moments(pass_at_n_weights, 8, 16, 0.05)[1]) ** 0.5
    assert rare == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("baseline", ["none", "loo"])
def test_pass_at_n_learns_nothing_from_groups_without_contrast(baseline):
    estimator = PassAtN(target_n=4, baseline=baseline)
    assert estimator(torch.stack([torch.ones(8), torch.zeros(8)])).count_nonzero() == 0


def test_what_a_group_of_successes_leaves_out_is_as_small_as_documented():
    def left_out(m: int, target_n: int) -> float:
        return pass_at_n_weights(torch.ones(1, m, dtype=torch.float64), target_n, **UNIFORM)[0, 0].item()

    assert left_out(8, 16) == pytest.approx(3.3e-5, abs=1e-6)
    assert left_out(8, 128) < 1e-10
    assert left_out(4, 4) == pytest.approx(0.114, abs=1e-3)
    assert left_out(4, 1) == 1


def test_pass_at_n_pays_more_the_rarer_the_success():
    rewards = torch.tensor([[1.0] * s + [0.0] * (16 - s) for s in range(1, 16)])
    paid = PassAtN(target_n=128)(rewards)[:, 0]
    assert (paid.diff() < 0).all()
    assert (paid > 0).all()


def test_pass_at_n_stays_within_n_for_a_huge_n():
    rewards = torch.zeros(1, 64)
    rewards[0, 3] = 1
    advantages = PassAtN(target_n=4096)(rewards)
    assert 0 < advantages[0, 3] < 4096
    assert advantages.count_nonzero() == 1


def test_pass_at_n_warns_once_of_rewards_that_are_not_0_or_1():
    estimator = PassAtN(target_n=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(torch.tensor([[0.0, 1.0, 1.0]]))
    with pytest.warns(UserWarning, match="values other than 0 and 1.*threshold=0.5"):
        graded = estimator(torch.tensor([[0.2, 0.9, 0.6]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(estimator(torch.tensor([[0.2, 0.9, 0.7]])), graded)
        assert torch.equal(estimator(torch.tensor([[0.0, 1.0, 1.0]])), graded)


def test_pass_at_n_takes_rewards_above_the_threshold_for_successes():
    rewards, outcomes = torch.tensor([[0.5, 0.51, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64).split(1)
    with pytest.warns(UserWarning, match="values other than 0 and 1"):
        assert torch.equal(PassAtN()(rewards), PassAtN()(outcomes))


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"target_n": 0}, "target_n"),
        ({"prior_successes": 0.0}, "prior_successes"),
        ({"prior_failures": -1.0}, "prior_failures"),
        ({"threshold": math.inf}, "threshold"),
        ({"baseline": "mean"}, "baseline"),
    ],
)
def test_pass_at_n_names_the_argument_that_is_wrong(kwargs, argument):
    with pytest.raises(ValueError, match=rf"\b{argument} must be"):
        PassAtN(**kwargs)
