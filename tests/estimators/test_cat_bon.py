import numpy as np
import pytest
import torch
from scipy.special import ndtri

from tealightning.estimators import CatBon
from tealightning.functional.tail import expected_max_normal


def test_cat_bon_by_hand():
    """Quantiles 1/6, 3/6, 5/6; weights of N = 2 are 1/3, 1, 5/3; standardised rewards -1, 0, 1."""
    advantages = CatBon(target_n=2)(torch.tensor([[4.0, 2.0, 6.0]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[0.0, -1 / 3, 5 / 3]], dtype=torch.float64))


def test_cat_bon_with_n_1_standardises():
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    torch.testing.assert_close(CatBon(target_n=1)(rewards), expected)


def test_cat_bon_gives_tied_rewards_identical_advantages():
    advantages = CatBon(target_n=8)(torch.tensor([[0.1, 0.7, 0.3, 0.7]], dtype=torch.float64))[0]
    assert advantages[1] == advantages[3]


@pytest.mark.parametrize("m", [2, 16, 1024])
def test_cat_bon_stays_finite_for_a_huge_n(m):
    rewards = torch.randn(4, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = CatBon(target_n=4096)(rewards)
    assert torch.isfinite(advantages).all()
    assert (advantages.amax(1) > 0).all()


def test_cat_bon_at_n_far_above_m_leaves_the_second_best_a_five_thousandth():
    weights = CatBon(target_n=128)(torch.arange(16, dtype=torch.float64)[None])[0]
    standardised = CatBon(target_n=1)(torch.arange(16, dtype=torch.float64)[None])[0]
    second, best = (weights / standardised)[-2:].tolist()
    assert second / best == pytest.approx(1 / 4770, rel=0.01)


def test_cat_bon_follows_another_direction_than_best_of_n_however_large_the_group():
    """Normal rewards at their exact quantiles: the gradient in (log-scale, location) has the ratio c_N in truth."""
    m = 100_000
    rewards = torch.tensor(ndtri((np.arange(m) + 0.5) / m))[None]
    advantages = CatBon(target_n=128)(rewards)
    ratio = ((advantages * (rewards**2 - 1)).mean() / (advantages * rewards).mean()).item()
    assert expected_max_normal(128) == pytest.approx(2.5946, abs=1e-4)
    assert ratio == pytest.approx(2.357, abs=2e-3)
