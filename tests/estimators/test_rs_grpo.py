import math

import pytest
import torch

from tealightning.estimators import GRPO, RsGRPO

NORMAL = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_rs_grpo_by_hand():
    """Standardised -1, 0, 1; at beta = ln 2 their exponentials are 1/2, 1, 2, with mean 7/6."""
    advantages = RsGRPO(beta=math.log(2), eps=1e-12)(torch.tensor([[5.0, 3.0, 4.0]], dtype=torch.float64))
    expected = torch.tensor([[5 / 7, -4 / 7, -1 / 7]], dtype=torch.float64) / math.log(2)
    torch.testing.assert_close(advantages, expected)


def test_rs_grpo_is_its_formula():
    z = (NORMAL - NORMAL.mean(1, keepdim=True)) / (NORMAL.std(1, keepdim=True) + 0.1)
    tilted = (2 * z).exp()
    expected = (tilted / tilted.mean(1, keepdim=True) - 1) / 2
    torch.testing.assert_close(RsGRPO(eps=0.1)(NORMAL), expected)


@pytest.mark.parametrize("beta", [1e-6, 1e-12, 1e-100])
def test_rs_grpo_with_a_small_beta_is_grpo(beta):
    torch.testing.assert_close(RsGRPO(beta=beta)(NORMAL), GRPO()(NORMAL), rtol=1e-5, atol=1e-5)


def test_rs_grpo_with_a_huge_beta_pays_the_best_only():
    advantages = 1e6 * RsGRPO(beta=1e6)(NORMAL)
    assert advantages.amax(1).tolist() == pytest.approx([7.0] * 5)
    assert advantages.amin(1).tolist() == pytest.approx([-1.0] * 5)
    assert RsGRPO(beta=1e300)(NORMAL).isfinite().all()


def test_rs_grpo_gives_tied_rewards_identical_advantages():
    advantages = RsGRPO()(torch.tensor([[0.1, 0.7, 0.3, 0.7]], dtype=torch.float64))[0]
    assert advantages[1] == advantages[3]
