import numpy as np
import pytest

from tealightning.functional.tail import jackknife_weights, prefix_sizes


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
