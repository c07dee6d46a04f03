import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from tealightning.functional.tail import (
    expected_max_normal,
    extrapolated_best_of_n,
    jackknife_weights,
    prefix_sizes,
    smallest_group,
    tail_constants,
    tail_size,
    tail_statistics,
)

C_N = {
    1: 0.0,
    2: 0.5641895835477563,
    4: 1.029375373003964,
    8: 1.423600306045278,
    16: 1.765991393054788,
    32: 2.069668827928907,
    64: 2.34373346507944,
    128: 2.594597368599467,
    256: 2.82686327893922,
    512: 3.043903161204407,
    1024: 3.248239601375412,
    4096: 3.626082177769145,
}


@pytest.mark.parametrize(("n", "expected"), C_N.items())
def test_expected_max_normal(n, expected):
    assert expected_max_normal(n) == pytest.approx(expected, abs=1e-9)


def test_expected_max_normal_has_the_closed_form_of_3():
    assert expected_max_normal(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-12)


def test_expected_max_normal_grows_to_huge_n():
    """Against Blom's approximation, good to a percent."""
    for n in (10**6, 10**9):
        assert expected_max_normal(n) == pytest.approx(-ndtri((1 - 0.375) / (n + 0.25)), rel=0.01)


@pytest.mark.parametrize(
    ("n", "alpha", "field", "expected"),
    [
        (128, 0.25, "z", 0.6744897502),
        (128, 0.25, "lambda_", 1.2711062907),
        (128, 0.25, "kappa", 0.4915658269),
        (16, 0.25, "ct_n", 1.00675245),
        (64, 0.25, "ct_n", 2.18206213),
        (128, 0.25, "ct_n", 2.69239847),
        (512, 0.25, "ct_n", 3.60642822),
        (128, 0.1, "z", 1.2815515655),
        (128, 0.1, "lambda_", 1.7549833193),
        (128, 0.1, "kappa", 0.4112604640),
        (128, 0.1, "ct_n", 2.04156276),
        (128, 0.5, "lambda_", 0.7978845608),
        (128, 0.5, "kappa", 0.6028102750),
        (128, 0.5, "ct_n", 2.98056102),
        (128, 1.0, "lambda_", 0.0),
        (128, 1.0, "ct_n", 2.594597368599467),
    ],
)
def test_tail_constants(n, alpha, field, expected):
    assert getattr(tail_constants(n, alpha), field) == pytest.approx(expected, abs=6e-9)


@pytest.mark.parametrize(
    ("alpha", "m", "k"),
    [
        (0.1, 30, 3),
        (0.25, 16, 4),
        (0.25, 17, 5),
        (0.25, 1, 1),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.07, 100, 7),
        (1.0, 5, 5),
    ],
)
def test_tail_size_is_robust_to_float_error(alpha, m, k):
    assert tail_size(alpha, m) == k
    rewards = torch.arange(float(m))[None]
    assert tail_statistics(rewards, alpha).k.item() == k
    assert tail_statistics(rewards, alpha, torch.ones(1, m, dtype=torch.bool)).k.item() == k


def test_smallest_group_is_the_first_whose_tail_is_large_enough():
    assert [smallest_group(0.25, k) for k in (1, 2, 3)] == [1, 5, 9]
    assert smallest_group(0.1, 2) == 11
    assert smallest_group(1.0, 3) == 3


def test_tail_statistics_by_hand():
    tail = tail_statistics(torch.tensor([[0.0, 4.0, 1.0, 2.0]]), 0.75)
    assert tail.threshold.item() == 1.0
    assert tail.mean_excess.item() == pytest.approx(4 / 3)
    assert tail.std.item() == pytest.approx((14 / 9) ** 0.5)


def test_tail_statistics_leave_invalid_samples_out():
    rewards = torch.tensor([[0.0, 4.0, 1.0, 2.0, 9.0, 7.0], [5.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    tail = tail_statistics(rewards, 0.75, valid)
    assert tail.k[:, 0].tolist() == [3, 2]
    assert tail.threshold[:, 0].tolist() == [1.0, 3.0]
    assert tail.std[:, 0].tolist() == pytest.approx([(14 / 9) ** 0.5, 1.0])


def test_extrapolated_best_of_n_of_normal_samples_is_near_the_truth():
    samples = torch.randn(400, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = extrapolated_best_of_n(3 * samples - 1, [128, 4096])
    expected = torch.tensor([3 * C_N[128] - 1, 3 * C_N[4096] - 1], dtype=torch.float64)
    # standard error over 400 prompts about 0.02, bias of the plug-in about -0.07
    torch.testing.assert_close(values.mean(0), expected, rtol=0, atol=0.15)


def test_extrapolated_best_of_n_is_exact_for_what_it_defines_and_nan_without_a_tail():
    rewards = torch.tensor([[0.0, 4.0, 1.0, 2.0], [0.0, 4.0, 1.0, 2.0]])
    valid = torch.tensor([[True] * 4, [True] + [False] * 3])
    values = extrapolated_best_of_n(rewards, [64], alpha=0.75, valid=valid)
    assert values[0, 0].item() == pytest.approx(7 / 3 + tail_constants(64, 0.75).ct_n * (14 / 9) ** 0.5)
    assert values[1, 0].isnan()


def test_prefix_sizes_grow_strictly_and_end_at_the_group():
    assert prefix_sizes(16, 4) == (4, 8, 12, 16)
    for m in range(4, 60):
        sizes = prefix_sizes(m, 4)
        assert sizes[-1] == m
        assert all(a < b for a, b in zip((0, *sizes), sizes, strict=False))


def test_jackknife_weights_of_quarters():
    assert jackknife_weights((4, 8, 12, 16), 2) == pytest.approx((-19 / 39, 11 / 39, 21 / 39, 26 / 39), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_jackknife_weights_cancel_powers_with_the_smallest_norm(order):
    sizes = np.array([5, 9, 16, 21], dtype=float)
    weights = np.array(jackknife_weights((5, 9, 16, 21), order))
    conditions = sizes ** -np.arange(order)[:, None]
    assert conditions @ weights == pytest.approx([1.0] + [0.0] * (order - 1), abs=1e-10)
    null_space = np.linalg.svd(conditions)[2][order:]
    assert null_space @ weights == pytest.approx(np.zeros(4 - order), abs=1e-9)
