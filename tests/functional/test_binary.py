"""pass@N factors against the closed form, the unbiased limit and numerical integration."""

import math

import pytest
import torch

from tealightning.functional.binary import (
    pass_at_n_factors,
    pass_at_n_weights,
)
from tealightning.functional.max_at_k import max_at_k_loo_weights

ALL_GROUPS_OF_6 = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)


def test_pass_at_n_weights_by_hand():
    """Three failures beside the success: 2 E[1-p], p ~ Beta(1, 4), is 8/5; a failure has one success beside it: 6/5."""
    outcomes = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    prior = {"prior_successes": 1.0, "prior_failures": 1.0}
    assert pass_at_n_weights(outcomes, 2, **prior).tolist() == [[0.0, 8 / 5, 0.0, 0.0]]
    loo = pass_at_n_weights(outcomes, 2, baseline="loo", **prior)
    torch.testing.assert_close(loo, torch.tensor([[-2 / 5, 8 / 5, -2 / 5, -2 / 5]], dtype=torch.float64))


@pytest.mark.parametrize("target_n", [2, 3, 4, 5, 6])
def test_pass_at_n_weights_with_the_unbiased_prior_are_those_of_max_at_k(target_n):
    weights = pass_at_n_weights(ALL_GROUPS_OF_6, target_n, prior_successes=0, prior_failures=2 - target_n)
    torch.testing.assert_close(weights, max_at_k_loo_weights(ALL_GROUPS_OF_6, target_n), rtol=0, atol=1e-12)


def test_pass_at_1_is_the_mean_reward_without_and_with_its_leave_one_out_baseline():
    prior = {"prior_successes": 0, "prior_failures": 1}
    assert torch.equal(pass_at_n_weights(ALL_GROUPS_OF_6, 1, **prior), ALL_GROUPS_OF_6)
    rloo = max_at_k_loo_weights(ALL_GROUPS_OF_6, 1)
    loo = pass_at_n_weights(ALL_GROUPS_OF_6, 1, baseline="loo", **prior)
    torch.testing.assert_close(loo, rloo, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.5, 2.5), (3.0, 0.1)])
@pytest.mark.parametrize("target_n", [2, 7, 40])
def test_pass_at_n_factors_are_the_posterior_moment_of_the_others(a, b, target_n):
    outcomes = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    factors = pass_at_n_factors(outcomes, target_n, prior_successes=a, prior_failures=b)[0]

    def moment(successes: float, failures: float) -> float:
        """N E[(1-p)^(N-1)] = N B(a + s, b + f + N - 1)/B(a + s, b + f)."""
        s, f = a + successes, b + failures
        log = math.lgamma(f + target_n - 1) - math.lgamma(s + f + target_n - 1) + math.lgamma(s + f) - math.lgamma(f)
        return target_n * math.exp(log)

    assert factors[0].item() == pytest.approx(moment(1, 3), rel=1e-10)
    assert factors[1].item() == pytest.approx(moment(2, 2), rel=1e-10)


@pytest.mark.parametrize(("m", "target_n"), [(64, 4096), (4096, 4096), (4096, 2), (2, 100_000)])
def test_pass_at_n_factors_stay_finite_and_within_0_and_n(m, target_n):
    outcomes = torch.zeros(3, m, dtype=torch.float64)
    outcomes[1, 0], outcomes[2] = 1, 1
    priors = [(1.0, 1.0)] + ([(0.0, 2.0 - target_n)] if target_n <= m else [])
    for a, b in priors:
        factors = pass_at_n_factors(outcomes, target_n, prior_successes=a, prior_failures=b)
        assert torch.isfinite(factors).all()
        assert ((factors >= 0) & (factors <= target_n * (1 + 1e-12))).all()


def test_pass_at_n_factors_refuse_a_prior_without_a_posterior():
    with pytest.raises(ValueError, match=r"above 1 - m = -3.*needs target_n <= m"):
        pass_at_n_factors(torch.zeros(1, 4, dtype=torch.float64), 5, prior_successes=0, prior_failures=-3)
