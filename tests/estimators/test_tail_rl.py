import math

import pytest
import torch

from tealightning.estimators import MaxRL, OptimalTEA, TailRL
from tealightning.functional.max_at_k import max_at_k_loo_weights
from tealightning.functional.tail import expected_max_normal

GROUPS = 30_000


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_tail_rl_by_hand():
    """Gaps 1, 0, 2 are shared by 3, 2 and 1 rollouts: weights 0, 4/3, 4/3 and 4/3 + 2*4 = 28/3, mean 3."""
    advantages = TailRL()(torch.tensor([[1.0, 4.0, 2.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[-3.0, 19 / 3, -5 / 3, -5 / 3]], dtype=torch.float64))


def defined(rewards: list[float]) -> list[float]:
    """The definition with R_(0) = 0, for distinct rewards."""
    m, ascending = len(rewards), [0.0, *sorted(rewards)]
    steps = [(ascending[j] - ascending[j - 1]) / (m - j + 1) for j in range(1, m + 1)]
    weights = [m * sum(steps[: ascending.index(reward, 1)]) for reward in rewards]
    return [weight - sum(weights) / m for weight in weights]


@pytest.mark.parametrize("m", [2, 3, 7, 16])
def test_tail_rl_is_its_definition(m):
    rewards = normal(5, m)
    expected = torch.tensor([defined(row) for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(TailRL()(rewards), expected, rtol=0, atol=1e-12)


def test_tail_rl_gives_tied_rewards_identical_advantages():
    advantages = TailRL()(torch.tensor([[0.1, 0.7, 0.3, 0.7, 0.1, 0.7]], dtype=torch.float64))[0]
    assert advantages[1] == advantages[3] == advantages[5]
    assert advantages[0] == advantages[4]


@pytest.mark.parametrize("m", [2, 5, 16])
def test_tail_rl_adds_the_weights_of_every_max_at_k_and_subtracts_the_best(m):
    """k = 1 enters as the plain reward: the best of no others is 0."""
    rewards = torch.cat([normal(4, m), torch.randint(0, 3, (4, m), generator=torch.Generator().manual_seed(0))])
    summed = rewards + sum(max_at_k_loo_weights(rewards, k) / k for k in range(2, m + 1))
    torch.testing.assert_close(summed.mean(dim=1), rewards.amax(dim=1))
    torch.testing.assert_close(TailRL()(rewards), summed - rewards.amax(dim=1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_tail_rl_on_0_and_1_is_max_rl_but_for_its_eps(m):
    """Every group of m answers; MaxRL divides by mean + eps instead of by the mean."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * m)
    share = groups.mean(dim=1, keepdim=True)
    for eps in (1e-6, 0.1):
        torch.testing.assert_close(MaxRL(eps=eps)(groups), TailRL()(groups) * share / (share + eps), rtol=0, atol=1e-12)
    assert TailRL()(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).tolist() == [[3.0, -1.0, -1.0, -1.0]]


def pull(terms: int) -> float:
    """Spread over location in the gradient of `sum_{k <= terms} (1/k) E[max of k]` for normal rewards."""
    return sum(expected_max_normal(k) / k for k in range(1, terms + 1)) / sum(1 / k for k in range(1, terms + 1))


def location_and_spread(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    return torch.stack([(advantages * rewards).mean(1), (advantages * (rewards**2 - 1)).mean(1)], dim=1)


def test_tail_rl_at_m_16_acts_like_a_best_of_2_or_3():
    rewards = normal(GROUPS, 16)
    location, spread = location_and_spread(TailRL()(rewards), rewards).mean(0).tolist()
    assert location == pytest.approx(sum(1 / k for k in range(1, 16)), rel=0.02)
    assert spread / location == pytest.approx(pull(15), abs=0.02)
    assert pull(15) == pytest.approx(0.7839, abs=1e-4)
    assert expected_max_normal(2) < pull(15) < expected_max_normal(3)


def test_the_sum_up_to_a_budget_beyond_m_is_optimal_tea_with_a_smaller_weight_on_the_spread():
    """N = 128 from 16 rollouts: (1, pull) instead of (1, c_128), like a best of 6 or 7."""
    scale_weight = pull(128) / expected_max_normal(128)
    assert scale_weight == pytest.approx(0.5137, abs=1e-4)
    assert expected_max_normal(6) < pull(128) < expected_max_normal(7)
    rewards = normal(GROUPS, 16)
    found = location_and_spread(OptimalTEA(target_n=128, scale_weight=scale_weight)(rewards), rewards)
    error = found.std(0) / math.sqrt(GROUPS)
    truth = torch.tensor([1.0, pull(128)], dtype=torch.float64)
    assert ((found.mean(0) - truth).abs() < 5 * error).all()
    assert ((found.mean(0) - torch.tensor([1.0, expected_max_normal(128)])).abs()[1] > 10 * error[1]).all()
