import math
import warnings

import pytest
import torch

from tealightning.estimators import Entropic


def test_entropic_tilts_as_far_as_the_target_says():
    """Advantages determine the tilted weights: exp(beta R_i) / sum = (A_i + 1)/(A_i + m)."""
    rewards = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kl_target in (0.1, math.log(2), 2.0):
        advantages = Entropic(kl_target=kl_target)(rewards)
        shares = (advantages + 1) / (advantages + 16)
        torch.testing.assert_close(shares.sum(1), torch.ones(20, dtype=torch.float64))
        divergence = torch.xlogy(shares, shares * 16).sum(1)
        torch.testing.assert_close(divergence, torch.full_like(divergence, kl_target))


def test_entropic_with_a_fixed_beta_by_hand():
    rewards = torch.tensor([[0.0, math.log(2), math.log(4)]], dtype=torch.float64)
    expected = torch.tensor([[1 / 3 - 1, 2 / 2.5 - 1, 4 / 1.5 - 1]], dtype=torch.float64)
    torch.testing.assert_close(Entropic(beta=1.0)(rewards), expected)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0, 1.0],
        [1.0, 1.0 + 2**-52, 1.0, 1.0],
        [0.0, 1e-300, 1.0, 0.3],
        [0.0, -5e-324, -1.0, -0.3],
        [1e300, -1e300, 0.0, 1.0],
        [1.0, 1.0, 1.0, 0.0],
        [1.0, 1.0, 1.0 - 2**-53, 0.0],
    ],
)
def test_entropic_stays_moderate_where_the_original_runs_away(row):
    advantages = Entropic()(torch.tensor([row], dtype=torch.float64))
    assert advantages.min() >= -1
    assert 0 < advantages.max() < 13


def test_entropic_refuses_groups_that_cannot_be_that_far_from_uniform():
    with pytest.raises(ValueError, match=r"group_size=2.*kl_target \(now 0.6931\).*group_size to 3"):
        Entropic()(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"group_size=8.*group_size to 9"):
        Entropic(kl_target=math.log(8))(torch.zeros(1, 8))


@pytest.mark.parametrize("kl_target", [0.01, math.log(2), math.log(3), 2.0, math.log(1000)])
def test_entropic_accepts_exactly_the_groups_that_can(kl_target):
    smallest = Entropic(kl_target=kl_target).min_group_size
    assert math.log(smallest) > kl_target
    assert smallest == 2 or math.log(smallest - 1) <= kl_target + 1e-9


def test_entropic_warns_of_a_target_without_effect():
    with pytest.warns(UserWarning, match="kl_target=0.5 has no effect"):
        Entropic(kl_target=0.5, beta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Entropic(beta=1.0)
        Entropic(kl_target=0.5)


@pytest.mark.parametrize(("kwargs", "argument"), [({"kl_target": 0.0}, "kl_target"), ({"beta": -1.0}, "beta")])
def test_entropic_names_the_argument_that_is_wrong(kwargs, argument):
    with pytest.raises(ValueError, match=rf"\b{argument} must be"):
        Entropic(**kwargs)
