import warnings

import pytest
import torch

from tealightning.estimators import TEA, Direct
from tealightning.functional.tail import tail_constants

TWELVE = torch.tensor([[0.0, 4.0, -1.0, 1.0, -2.0, 2.0, -3.0, 0.0, -1.5, -0.5, 0.5, -4.0]], dtype=torch.float64)


def test_direct_weights_by_hand():
    """Tail of 3: rewards 1, 2, 4; threshold 1, mean 7/3, variance 14/9."""
    advantages = Direct(target_n=128, alpha=0.25)(TWELVE)[0]
    ct, sigma, mean = tail_constants(128, 0.25).ct_n, (14 / 9) ** 0.5, 7 / 3

    def weight(u):
        return 4 * ((u - 1) + ct / (2 * sigma) * ((u - mean) ** 2 - (1 - mean) ** 2))

    assert advantages[1].item() == pytest.approx(weight(4), abs=1e-12)
    assert advantages[5].item() == pytest.approx(weight(2), abs=1e-12)
    assert advantages[5] < 0  # the middle of the tail holds the spread back
    assert advantages.count_nonzero() == 2


def test_direct_with_a_tail_of_two_is_linear_and_warns_once():
    estimator = Direct(target_n=128, alpha=0.25)
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0, 3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="group_size=9"):
        advantages = estimator(rewards)
    assert advantages[0, 3] == 4 * 2.0
    assert advantages.count_nonzero() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(rewards)


def test_direct_does_not_care_which_of_the_rollouts_tied_at_the_threshold_count():
    rewards = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    advantages = Direct()(rewards)[0]
    assert advantages[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1] > 0


def test_tea_without_baseline_and_scale_is_direct():
    assert torch.equal(TEA(baseline="none", scale="none")(TWELVE), Direct()(TWELVE))


def test_tea_scales_are_what_they_say():
    weights = Direct()(TWELVE)
    by_std = TEA(scale="reward_std")(TWELVE)
    by_rms = TEA(scale="rms")(TWELVE)
    torch.testing.assert_close(by_std * TWELVE.std(), weights)
    torch.testing.assert_close(by_rms * weights.square().mean().sqrt(), weights)
    assert by_rms.square().mean().item() == pytest.approx(1.0)


def test_tea_baselines_are_what_they_say():
    weights = Direct()(TWELVE)
    others = (weights.sum() - weights) / 11
    torch.testing.assert_close(TEA(baseline="mean", scale="none")(TWELVE), weights - weights.mean())
    torch.testing.assert_close(TEA(baseline="loo", scale="none")(TWELVE), weights - others)


def test_tea_default_keeps_all_but_the_top_of_the_tail_at_exactly_zero():
    rewards = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = TEA()(rewards)
    assert (advantages.count_nonzero(dim=1) == 3).all()  # k = 4, and the threshold itself weighs 0


@pytest.mark.parametrize("scale", ["none", "reward_std", "rms"])
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_tea_gives_zeros_for_a_tail_without_spread(baseline, scale):
    rewards = torch.tensor([[0.1] * 4 + [-1.0, -2.0, 0.0, -0.5, -0.7, -3.0, -4.0, -5.0]], dtype=torch.float64)
    assert TEA(baseline=baseline, scale=scale)(rewards).count_nonzero() == 0
