"""Expectations over the tail of a normal sample: against a finer quadrature, simulation and closed forms."""

import math

import numpy as np
import pytest
import torch

from tealightning.functional.normal_tail import DEFAULT, Resolution, threshold_nodes, tilted_excess
from tealightning.functional.optimal_tail import (
    calibrated_coefficients,
    calibration_matrix,
    noise_matrices,
    rank_basis,
    signal_matrix,
)
from tealightning.functional.tail import expected_max_normal

FINER = Resolution(threshold=64, t=80, centre=72, excess=80)


@pytest.mark.parametrize(
    ("m", "expected", "coefficients"),
    [
        (12, [[0.667, -0.024], [0.916, 0.051]], (2.02, 14.6)),
        (16, [[0.750, -0.035], [1.012, 0.101]], (1.72, 8.40)),
        (32, [[0.876, -0.039], [1.146, 0.230]], (1.35, 4.57)),
        (64, [[0.937, -0.027], [1.209, 0.336]], (1.17, 3.52)),
    ],
)
def test_calibration_matrix_has_the_values_of_a_simulation(m, expected, coefficients):
    """The figures are from an independent simulation with an error of about 0.3%."""
    matrix = np.array(calibration_matrix(m, m // 4)) / 0.25
    np.testing.assert_allclose(matrix, expected, rtol=0.004, atol=0.002)
    np.testing.assert_allclose(calibrated_coefficients(m, 128, 0.25), coefficients, rtol=0.006)


@pytest.mark.parametrize(("m", "k"), [(3, 3), (12, 3), (16, 4), (16, 16), (64, 16), (128, 32), (512, 128)])
def test_calibration_matrix_is_accurate_to_1e_6(m, k):
    np.testing.assert_allclose(calibration_matrix(m, k), calibration_matrix(m, k, FINER), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("m", "k"), [(12, 3), (16, 4), (32, 8), (40, 13)])
def test_calibration_matrix_of_the_linear_term_has_its_closed_form(m, k):
    """Moving all rewards by one moves the mean excess over the k-th by 0 and that over a fixed level by (k-1)/m."""
    assert calibration_matrix(m, k)[0][0] == pytest.approx((k - 1) / m, abs=1e-9)


CASES = [
    (12, 3, "tail_rms"),
    (16, 4, "tail_rms"),
    (16, 4, "group_std"),
    (16, 8, "tail_std"),
    (16, 16, "group_std"),
    (20, 5, "tail_std"),
    (32, 8, "tail_std"),
]


@pytest.mark.parametrize(("m", "k", "scale"), CASES)
def test_signal_matrix_is_accurate_to_1e_6(m, k, scale):
    np.testing.assert_allclose(signal_matrix(m, k, scale), signal_matrix(m, k, scale, FINER), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("m", "k"), [(128, 128), (512, 128)])
def test_signal_matrix_is_accurate_for_long_tails(m, k):
    """The density of one rank among many is narrow: it needs more nodes."""
    finer = signal_matrix(m, k, "tail_rms", Resolution(excess=300))
    np.testing.assert_allclose(signal_matrix(m, k, "tail_rms"), finer, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("m", "k", "scale"), CASES)
def test_signal_matrix_agrees_with_simulation(m, k, scale):
    rewards = torch.randn(200_000, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    top = rewards.topk(k, dim=1).values
    basis = torch.cat(rank_basis(rewards, top, scale), dim=1) / m
    scores = torch.cat([top[:, :-1]] * 2, dim=1)
    gradient = torch.stack([basis * scores, basis * (scores.square() - 1)], dim=1)
    error = (gradient.std(0) / len(rewards) ** 0.5).numpy()
    assert (np.abs(gradient.mean(0).numpy() - signal_matrix(m, k, scale)) < 4.5 * error).all()


@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 1), (16, 4), (16, 16), (64, 16)])
def test_threshold_nodes_integrate_the_kth_largest(m, k):
    r, weight = threshold_nodes(m, k, DEFAULT.threshold)
    assert weight.sum() == pytest.approx(1.0, abs=1e-7)
    if k == 1:
        assert weight @ r == pytest.approx(expected_max_normal(m), abs=1e-7)
    if k == m:
        assert weight @ r == pytest.approx(-expected_max_normal(m), abs=1e-6)


@pytest.mark.parametrize("r", [-2.0, 0.5, 3.0])
def test_tilted_excess_is_the_product_of_the_densities(r):
    """Against a plain sum: phi(x) exp(-a (x - b)^2) over x > r."""
    a, b = np.array([0.0, 0.3, 5.0]), np.array([0.0, 1.0, -0.5])
    one = tilted_excess(r, a, b, 64)
    x = r + (np.arange(2_000_000) + 0.5) * 1e-5
    for i in range(len(a)):
        density = np.exp(-x * x / 2 - a[i] * (x - b[i]) ** 2)
        untilted = np.exp(-x * x / 2).sum()
        assert math.exp(one.log_mass[i]) == pytest.approx(density.sum() / untilted, rel=1e-6)
        assert one.probability[i].sum() == pytest.approx(1.0, abs=1e-9)
        assert one.probability[i] @ one.excess[i] == pytest.approx(((x - r) * density).sum() / density.sum(), rel=1e-6)
        np.testing.assert_allclose(np.exp(one.log_cdf[i]) + np.exp(one.log_sf[i]), 1.0, atol=1e-12)


def test_noise_matrices_are_second_moments():
    noise, unrelated = noise_matrices(16, 4, "tail_rms", draws=1 << 16)
    np.testing.assert_allclose(noise, noise.T, atol=1e-15)
    assert (np.linalg.eigvalsh(noise) > 0).all()
    assert (np.linalg.eigvalsh(unrelated) > 0).all()
    ranks = np.arange(6) % 3
    assert ((unrelated != 0) == (ranks[:, None] == ranks)).all()
