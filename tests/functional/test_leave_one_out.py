import pytest
import torch

from tealightning.functional.moments import sum_of_others


def test_sum_of_others_by_hand():
    assert sum_of_others(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[6.0, 5.0, 3.0]]
    assert sum_of_others(torch.tensor([[7.0]])).tolist() == [[0.0]]


def test_sum_of_others_keeps_small_others_of_a_large_value():
    values = torch.tensor([[1e-20, 1.0, 2e-20]], dtype=torch.float64)
    assert sum_of_others(values)[0, 1].item() == pytest.approx(3e-20, rel=1e-12)
