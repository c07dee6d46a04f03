import math

import pytest
import torch

from tealightning.estimators import Infalign


def test_infalign_by_hand():
    """Win rates 1/2, 0, 1/2, 1: a reward of 2 beats one, loses to one and ties with one."""
    transformed = torch.tensor([0.5, 0.0, 0.5, 1.0], dtype=torch.float64).mul(3.0).expm1() / math.expm1(3.0)
    advantages = Infalign(tilt=3.0)(torch.tensor([[2.0, 0.0, 2.0, 5.0]], dtype=torch.float64))[0]
    torch.testing.assert_close(advantages, transformed - transformed.mean())


def test_infalign_sees_nothing_but_the_order():
    rewards = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(Infalign()(rewards), Infalign()(rewards.exp()))


def test_infalign_with_a_small_tilt_is_the_centred_win_rate():
    advantages = Infalign(tilt=1e-9)(torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float64))


def test_infalign_with_a_huge_tilt_pays_the_single_winner_only():
    advantages = Infalign(tilt=1e5)(torch.tensor([[0.0, 5.0, 2.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[-0.25, 0.75, -0.25, -0.25]], dtype=torch.float64))


@pytest.mark.parametrize("tilt", [0.0, -1.0, math.inf])
def test_infalign_names_the_argument_that_is_wrong(tilt):
    with pytest.raises(ValueError, match=r"\btilt must be"):
        Infalign(tilt=tilt)
