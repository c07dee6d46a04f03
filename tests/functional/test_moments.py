"""Centring, leave-one-out sums, ranks and win rates."""

import pytest
import torch

from tealightning.functional.moments import (
    best_of_n_rank_weights,
    centred,
    exponential_tilt,
    mid_rank_quantiles,
    ratio_or_zero,
    root_mean_square,
    sample_std,
    sum_of_others,
    win_rates,
)


def test_centred_is_exactly_zero_in_a_constant_group():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert (rewards - rewards.mean()).abs().max() > 0  # why it is not written like this
    assert centred(rewards).count_nonzero() == 0


def test_centred_keeps_digits_under_a_large_offset():
    assert centred(torch.tensor([1e15, 1e15 + 1, 1e15 + 2], dtype=torch.float64)).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("magnitude", [1e-320, 1e-200, 1.0, 1e200, 1e307])
def test_root_mean_square_neither_overflows_nor_underflows(magnitude):
    value = root_mean_square(torch.tensor([3.0, 4.0], dtype=torch.float64) * magnitude, 2)
    assert value.item() == pytest.approx(12.5**0.5 * magnitude, rel=1e-3)  # 1e-320 has few digits


def test_root_mean_square_of_zeros_is_zero():
    assert root_mean_square(torch.zeros(2, 3), 3).tolist() == [[0.0], [0.0]]


def test_sample_std_divides_by_m_minus_1():
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sample_std(values)[:, 0], values.std(dim=1))


def test_ratio_or_zero_is_zero_where_the_denominator_is():
    assert ratio_or_zero(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])).tolist() == [0.0, 0.5]


def test_sum_of_others_by_hand():
    assert sum_of_others(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[6.0, 5.0, 3.0]]
    assert sum_of_others(torch.tensor([[7.0]])).tolist() == [[0.0]]


def test_sum_of_others_keeps_small_others_of_a_large_value():
    values = torch.tensor([[1e-20, 1.0, 2e-20]], dtype=torch.float64)
    assert sum_of_others(values)[0, 1].item() == pytest.approx(3e-20, rel=1e-12)


TIED = torch.tensor([[2.0, 0.0, 2.0, 5.0]], dtype=torch.float64)


def test_mid_rank_quantiles_share_the_middle_of_tied_places():
    assert mid_rank_quantiles(TIED).tolist() == [[0.5, 0.125, 0.5, 0.875]]


def test_win_rates_count_the_others_only_and_a_tie_half():
    assert win_rates(TIED).tolist() == [[0.5, 0.0, 0.5, 1.0]]
    assert win_rates(torch.full((1, 5), 0.1)).tolist() == [[0.5] * 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_of_a_transposed_tensor_are_those_of_its_rows(dtype):
    rewards = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    rates = win_rates(rewards.T.contiguous().T)
    beaten = (rewards[:, :, None] > rewards[:, None, :]).double().sum(2) / 6
    assert torch.equal(rates, beaten)


def test_best_of_n_rank_weights_have_mean_1_and_the_ratio_of_the_density():
    quantiles = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    weights = best_of_n_rank_weights(quantiles, 3)[0]
    assert (weights[1] / weights[0]).item() == pytest.approx(3.0**2, rel=1e-12)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("n", [1, 128, 4096, 10**6])
def test_best_of_n_rank_weights_neither_overflow_nor_vanish(n):
    weights = best_of_n_rank_weights(mid_rank_quantiles(torch.arange(64.0)[None]), n)
    assert torch.isfinite(weights).all()
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-12)


def test_exponential_tilt_is_its_formula():
    quantiles = torch.linspace(0, 1, 5, dtype=torch.float64)
    for tilt in (1e-8, 1.0, 10.0):
        expected = torch.expm1(tilt * quantiles) / torch.expm1(torch.tensor(tilt, dtype=torch.float64))
        torch.testing.assert_close(exponential_tilt(quantiles, tilt), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tilt", [1e-300, 800.0, 1e6])
def test_exponential_tilt_keeps_its_ends_for_extreme_tilts(tilt):
    tilted = exponential_tilt(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), tilt)
    assert tilted[0] == 0
    assert tilted[2] == 1
    assert tilted[1].item() == pytest.approx(0.5 if tilt < 1 else 0.0, abs=1e-15)
