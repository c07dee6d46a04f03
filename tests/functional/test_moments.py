import pytest
import torch

from tealightning.functional.moments import centred, ratio_or_zero, root_mean_square, sample_std


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
