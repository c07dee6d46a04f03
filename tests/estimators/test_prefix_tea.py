import pytest
import torch

from tealightning.estimators import Direct, PrefixTEA


def test_prefix_tea_with_one_prefix_is_direct():
    rewards = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(PrefixTEA(num_prefixes=1, order=1, rotations=1)(rewards), Direct()(rewards))


def test_prefix_tea_of_order_1_averages_the_prefixes():
    rewards = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = torch.zeros_like(rewards)
    with pytest.warns(UserWarning):
        half[:, :8] = 2 * Direct()(rewards[:, :8])
    expected = (half + Direct()(rewards)) / 2
    torch.testing.assert_close(PrefixTEA(num_prefixes=2, order=1, rotations=1)(rewards), expected)


def test_prefix_tea_rotations_average_over_cyclic_shifts():
    rewards = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = PrefixTEA(rotations=1)
    shifted = [once(rewards.roll(-start, 1)).roll(start, 1) for start in (0, 4, 8)]
    torch.testing.assert_close(PrefixTEA(rotations=3)(rewards), torch.stack(shifted).mean(0))


def test_prefix_tea_depends_on_the_order_of_the_rollouts():
    rewards = torch.randn(1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimator = PrefixTEA()
    assert not torch.allclose(estimator(rewards.roll(1, 1)).roll(-1, 1), estimator(rewards))
