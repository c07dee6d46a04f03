"""Off-policy max@k against subset enumeration, its on-policy limit, and exact expectations."""

import itertools
import math

import pytest
import torch

from tealightning.functional.max_at_k import (
    max_at_k_loo_weights,
    max_at_k_weights,
    off_policy_max_at_k_loo_weights,
    off_policy_max_at_k_weights,
)

BOTH = pytest.mark.parametrize("weights", [off_policy_max_at_k_weights, off_policy_max_at_k_loo_weights])


def groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards with and without ties [4, 7], and ratios between 0.05 and 20."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    tied = torch.randint(0, 3, (2, 7), generator=generator).double()
    return torch.cat([distinct, tied]), torch.randn(4, 7, generator=generator, dtype=torch.float64).exp()


def enumerated(rewards: list[float], ratios: list[float], k: int, loo: bool) -> list[float]:
    m = len(rewards)
    totals = [0.0] * m
    for subset in itertools.combinations(range(m), k):
        product = math.prod(ratios[j] for j in subset)
        for i in subset:
            without = max(rewards[j] for j in subset if j != i) if loo else 0.0
            totals[i] += product * (max(rewards[j] for j in subset) - without)
    return [m * total / math.comb(m, k) for total in totals]


@pytest.mark.parametrize("k", [2, 3, 5, 7])
@BOTH
def test_off_policy_weights_equal_subset_enumeration(weights, k):
    loo = weights is off_policy_max_at_k_loo_weights
    rewards, ratios = groups()
    pairs = zip(rewards.tolist(), ratios.tolist(), strict=True)
    expected = torch.tensor([enumerated(*pair, k, loo) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(weights(rewards, ratios, k), expected, rtol=1e-12, atol=1e-12)


def test_off_policy_weights_of_single_rollouts_are_importance_weighted():
    rewards = torch.tensor([[1.0, 4.0, 2.0]], dtype=torch.float64)
    ratios = torch.tensor([[0.5, 2.0, 1.5]], dtype=torch.float64)
    assert off_policy_max_at_k_weights(rewards, ratios, 1).tolist() == [[0.5, 8.0, 3.0]]
    baselines = [(2 * 4 + 1.5 * 2) / 3.5, (0.5 * 1 + 1.5 * 2) / 2, (0.5 * 1 + 2 * 4) / 2.5]
    expected = ratios * (rewards - torch.tensor([baselines], dtype=torch.float64))
    torch.testing.assert_close(off_policy_max_at_k_loo_weights(rewards, ratios, 1), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_off_policy_weights_without_a_shift_of_policy_are_the_on_policy_ones(k):
    rewards, _ = groups()
    ones = torch.ones_like(rewards)
    plain = off_policy_max_at_k_weights(rewards, ones, k)
    torch.testing.assert_close(plain, max_at_k_weights(rewards, k), rtol=0, atol=1e-10)
    loo = off_policy_max_at_k_loo_weights(rewards, ones, k)
    torch.testing.assert_close(loo, max_at_k_loo_weights(rewards, k), rtol=0, atol=1e-10)


def test_off_policy_weights_stay_exact_in_large_groups():
    rewards = torch.randn(2, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones_like(rewards)
    plain = off_policy_max_at_k_weights(rewards, ones, 200)
    torch.testing.assert_close(plain, max_at_k_weights(rewards, 200), rtol=1e-10, atol=1e-10)
    loo = off_policy_max_at_k_loo_weights(rewards, ones, 200)
    torch.testing.assert_close(loo, max_at_k_loo_weights(rewards, 200), rtol=1e-10, atol=1e-10)


POLICY = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64)  # logits
BEHAVIOUR = torch.tensor([-0.3, 0.8, 0.1], dtype=torch.float64)
OUTCOMES = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def exact_gradient(k: int) -> torch.Tensor:
    logits = POLICY.clone().requires_grad_()
    tuples = torch.cartesian_prod(*[torch.arange(3)] * k).view(-1, k)
    (logits.softmax(0)[tuples].prod(1) * OUTCOMES[tuples].amax(1)).sum().backward()
    return logits.grad


def expected_estimate(estimate, m: int) -> torch.Tensor:
    """E_mu[(1/m) sum_i A_i grad log pi(y_i)] over all 3^m groups drawn from the behaviour policy."""
    pi, mu = POLICY.softmax(0), BEHAVIOUR.softmax(0)
    drawn = torch.cartesian_prod(*[torch.arange(3)] * m)
    advantages = estimate(OUTCOMES[drawn], (pi / mu)[drawn])
    scores = torch.eye(3, dtype=torch.float64)[drawn] - pi
    return (mu[drawn].prod(1)[:, None] * (advantages[..., None] * scores).mean(1)).sum(0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@BOTH
def test_off_policy_weights_are_unbiased(weights, k):
    estimate = expected_estimate(lambda rewards, ratios: weights(rewards, ratios, k), 5)
    torch.testing.assert_close(estimate, exact_gradient(k), rtol=0, atol=1e-12)


def test_on_policy_weights_are_biased_off_policy():
    ignored = expected_estimate(lambda rewards, ratios: max_at_k_loo_weights(rewards, 3), 5)
    assert (ignored - exact_gradient(3)).abs().max() > 1e-2


def test_the_baseline_needs_the_ratio_of_its_own_rollout():
    """max over I without i, weighed by the ratios of I without i only, no longer has expectation zero."""

    def without_own_ratio(rewards, ratios):
        plain = off_policy_max_at_k_weights(rewards, ratios, 3)
        baseline = plain - off_policy_max_at_k_loo_weights(rewards, ratios, 3)
        return plain - baseline / ratios

    assert (expected_estimate(without_own_ratio, 5) - exact_gradient(3)).abs().max() > 1e-2


def test_off_policy_loo_weights_are_never_negative_and_ignore_shifts():
    rewards, ratios = groups()
    weights = off_policy_max_at_k_loo_weights(rewards, ratios, 3)
    assert (weights >= 0).all()
    torch.testing.assert_close(off_policy_max_at_k_loo_weights(rewards + 8, ratios, 3), weights)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_off_policy_loo_weights_are_zero_in_a_constant_group(k):
    ratios = torch.rand(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert off_policy_max_at_k_loo_weights(torch.full_like(ratios, 0.1), ratios, k).count_nonzero() == 0


@BOTH
def test_off_policy_weights_survive_ratios_of_zero(weights):
    rewards = torch.tensor([[1.0, 4.0, 2.0]], dtype=torch.float64)
    ratios = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
    assert weights(rewards, ratios, 1).tolist() == [[0.0, 8.0 if weights is off_policy_max_at_k_weights else 5.0, 0.0]]
    assert weights(rewards, ratios, 2).count_nonzero() == 0


@BOTH
@pytest.mark.parametrize(
    ("ratios", "k", "message"),
    [
        (torch.ones(1, 3), 2, "ratios must have the shape"),
        (torch.ones(1, 4), 5, "k must be from 1 to the group size"),
        (torch.ones(1, 4), 0, "k must be from 1 to the group size"),
        (-torch.ones(1, 4), 2, "ratios must be finite"),
        (torch.full((1, 4), float("nan")), 2, "ratios must be finite"),
    ],
)
def test_off_policy_weights_name_the_argument_that_is_wrong(weights, ratios, k, message):
    with pytest.raises(ValueError, match=message):
        weights(torch.zeros(1, 4, dtype=torch.float64), ratios.double(), k)
