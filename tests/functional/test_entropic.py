import math

import pytest
import torch

from tealightning.functional.entropic import (
    LARGEST_TILT,
    _kl_to_uniform,
    adaptive_beta,
    below_top,
    entropic_weights,
    leave_one_out_tilt,
)


def test_below_top_puts_rewards_on_the_range_of_the_group():
    rewards = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.1, 0.1]], dtype=torch.float64)
    assert below_top(rewards).tolist() == [[0.0, -1.0, -0.5], [0.0, 0.0, 0.0]]


def test_kl_to_uniform_runs_from_0_to_ln_m():
    logits = torch.tensor([[0.0] * 4, [0.0, 0.0, -1e300, -1e300], [0.0] + [-1e308] * 3], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(_kl_to_uniform(logits)[:, 0], expected)


@pytest.mark.parametrize("kl_target", [1e-6, 0.1, math.log(2), 2.0, math.log(8) - 1e-6])
def test_adaptive_beta_reaches_its_target(kl_target):
    rewards = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = below_top(rewards)
    reached = _kl_to_uniform(adaptive_beta(positions, kl_target) * positions)
    torch.testing.assert_close(reached, torch.full_like(reached, kl_target), rtol=1e-7, atol=1e-12)


def test_adaptive_beta_finds_a_top_that_leads_by_next_to_nothing():
    positions = torch.tensor([[0.0, -1e-200, -1e-200, -1.0]], dtype=torch.float64)
    beta = adaptive_beta(positions, math.log(2))
    assert _kl_to_uniform(beta * positions).item() == pytest.approx(math.log(2), rel=1e-9)


def test_adaptive_beta_is_infinite_where_ties_put_the_target_out_of_reach():
    positions = torch.tensor([[0.0, 0.0, -0.5, -1.0], [0.0] * 4, [0.0, -0.1, -0.5, -1.0]], dtype=torch.float64)
    assert adaptive_beta(positions, math.log(2)).isinf()[:, 0].tolist() == [True, True, False]


def test_entropic_weights_of_ties_at_the_top_are_the_limit():
    rewards = torch.tensor([[5.0, 5.0, 1.0, 4.0, 0.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(
        entropic_weights(rewards, math.log(2)), torch.tensor([[1.5, 1.5, -1.0, -1.0, -1.0, 1.5]], dtype=torch.float64)
    )


def test_leave_one_out_tilt_by_hand():
    logits = torch.tensor([[0.0, math.log(1 / 2), math.log(1 / 4)]], dtype=torch.float64)
    expected = [[1 / (3 / 8) - 1, (1 / 2) / (5 / 8) - 1, (1 / 4) / (3 / 4) - 1]]
    torch.testing.assert_close(leave_one_out_tilt(logits), torch.tensor(expected, dtype=torch.float64))


def test_leave_one_out_tilt_of_a_runaway_winner_is_exact_up_to_its_cap():
    logits = torch.tensor([[0.0, -60.0, -60.0], [0.0, -1e9, -math.inf]], dtype=torch.float64)
    tilt = leave_one_out_tilt(logits)
    assert tilt[0, 0].item() == pytest.approx(math.exp(60.0), rel=1e-12)
    assert tilt[1].tolist() == [LARGEST_TILT - 1, -1.0, -1.0]
    assert torch.isfinite(tilt.float()).all()
