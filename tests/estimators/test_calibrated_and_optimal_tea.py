"""The exactly unbiased estimators: no bias at any group size, known noise, ragged groups, ties, constants on disk."""

import numpy as np
import pytest
import torch

from tealightning.estimators import CalibratedTEA, Direct, OptimalTEA, build_estimator, optimal_tea
from tealightning.functional.optimal_tail import noise_matrices, signal_matrix, tail_moments
from tealightning.functional.tail import expected_max_normal


def gradients(estimator, m: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of each group in (location, log-scale) [groups, 2], and its mean squared advantage [groups]."""
    generator = torch.Generator().manual_seed(seed)
    found, squares = [], []
    for _ in range(groups // 50_000):
        rewards = torch.randn(50_000, m, generator=generator, dtype=torch.float64)
        advantages = estimator(rewards)
        found.append(torch.stack([(advantages * rewards).mean(1), (advantages * (rewards**2 - 1)).mean(1)], dim=1))
        squares.append(advantages.square().mean(1))
    return torch.cat(found), torch.cat(squares)


@pytest.mark.slow
@pytest.mark.parametrize("m", [12, 16, 32, 64])
@pytest.mark.parametrize("name", ["calibrated_tea", "optimal_tea"])
def test_bias_is_zero(name, m):
    groups = {12: 1_500_000, 16: 500_000, 32: 200_000, 64: 100_000}[m]
    if name == "optimal_tea":
        groups = max(100_000, groups // 2)
    found, _ = gradients(build_estimator(name, target_n=128, alpha=0.25), m, groups, seed=m)
    truth = torch.tensor([1.0, expected_max_normal(128)], dtype=torch.float64)
    error = found.std(0) / len(found) ** 0.5
    assert (error < 0.01).all(), error
    assert ((found.mean(0) - truth).abs() < 3 * error).all(), (found.mean(0) - truth, error)


@pytest.mark.parametrize("m", [9, 15, 17])
@pytest.mark.parametrize("name", ["calibrated_tea", "optimal_tea"])
def test_bias_is_zero_for_groups_with_unscorable_rollouts(name, m):
    estimator = build_estimator(name, target_n=64, alpha=0.3)
    valid = torch.rand(50_000, 20, generator=torch.Generator().manual_seed(1)).argsort(1) < m
    rewards = torch.randn(50_000, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages = estimator(rewards, valid)
    found = torch.stack([advantages * rewards, advantages * (rewards**2 - 1)], dim=-1).sum(1) / m
    truth = torch.tensor([1.0, expected_max_normal(64)], dtype=torch.float64)
    assert ((found.mean(0) - truth).abs() < 4 * found.std(0) / len(found) ** 0.5).all()


@pytest.mark.parametrize(
    ("m", "sd"), [(16, (2.27, 5.67)), (32, (1.33, 3.53)), (64, (0.87, 2.44))], ids=["m16", "m32", "m64"]
)
def test_calibrated_tea_has_the_known_noise(m, sd):
    found, _ = gradients(CalibratedTEA(), m, 100_000)
    torch.testing.assert_close(found.std(0), torch.tensor(sd, dtype=torch.float64), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("m", "alpha", "scale", "lam", "sd", "rms"),
    [
        (16, 0.25, "tail_rms", 1, 1.23, 1.87),
        (16, 0.25, "tail_rms", 100, 1.48, 1.59),
        (16, 0.5, "tail_rms", 1, 0.79, 1.41),
        (16, 0.5, "tail_rms", 100, 1.03, 1.14),
        (32, 0.25, "tail_std", 100, 0.89, 1.35),
        (32, 0.5, "tail_rms", 100, 0.68, 1.03),
        (64, 0.25, "tail_std", 100, 0.59, 1.22),
    ],
)
def test_optimal_tea_has_the_known_noise(m, alpha, scale, lam, sd, rms):
    """Both over the signal, which is the projection of the expected gradient on the true one."""
    found, squares = gradients(OptimalTEA(alpha=alpha, scale=scale, lam=lam), m, 100_000)
    truth = torch.tensor([1.0, expected_max_normal(128)], dtype=torch.float64)
    signal = (found.mean(0) @ truth / truth.norm()).item()
    assert found.var(0).sum().sqrt().item() / signal == pytest.approx(sd, rel=0.03)
    assert squares.mean().sqrt().item() / signal == pytest.approx(rms, rel=0.03)


def test_optimal_tea_is_less_noisy_than_calibrated_tea():
    calibrated, _ = gradients(CalibratedTEA(), 16, 50_000)
    optimal, _ = gradients(OptimalTEA(), 16, 50_000)
    assert optimal.var(0).sum() < 0.6 * calibrated.var(0).sum()


@pytest.mark.parametrize("scale", ["tail_rms", "tail_std", "group_std"])
def test_optimal_tea_solves_the_constrained_minimum(scale):
    """Any other unbiased coefficients are noisier: steps along the null space of E raise c^T M c."""
    m, k, lam = 16, 8, 10.0
    moments = optimal_tea.constants(m, k, scale)
    c = optimal_tea._coefficients(m, k, scale, 128, lam, 1.0).flatten().numpy()
    np.testing.assert_allclose(moments.signal @ c, [1.0, expected_max_normal(128)], atol=1e-9)
    noise = moments.noise + lam * moments.unrelated
    null_space = np.linalg.svd(moments.signal)[2][2:]
    generator = np.random.default_rng(0)
    for _ in range(20):
        other = c + null_space.T @ generator.standard_normal(len(null_space)) * 0.1
        assert other @ noise @ other > c @ noise @ c


def test_optimal_tea_with_scale_weight_0_follows_the_mean():
    found, _ = gradients(OptimalTEA(alpha=1.0, scale="group_std", scale_weight=0.0), 16, 50_000)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - torch.tensor([1.0, 0.0])).abs() < 4 * error).all()


def test_optimal_tea_gives_tied_rewards_the_mean_of_their_ranks():
    rewards = torch.tensor([[3.0, 3.0, 1.0, 3.0, 0.5] + [0.0 - j for j in range(11)]], dtype=torch.float64)
    estimator = OptimalTEA(alpha=0.3)  # k = 5
    tied = estimator(rewards)[0]
    apart = estimator(rewards + torch.tensor([[1e-9, 0, 0, -1e-9, 0] + [0.0] * 11], dtype=torch.float64))[0]
    assert tied[0] == tied[1] == tied[3]
    assert tied[0].item() == pytest.approx(apart[[0, 1, 3]].mean().item(), rel=1e-6)
    assert apart[0] != apart[1] != apart[3]


@pytest.mark.parametrize(
    ("name", "kwargs", "group_size", "message"),
    [
        ("calibrated_tea", {}, 8, r"fewer than 3 rollouts at alpha=0.25; raise group_size to 9"),
        ("optimal_tea", {}, 8, r"fewer than 3 rollouts"),
        ("optimal_tea", {"scale": "tail_std"}, 16, r"fewer than 5 rollouts.*group_size to 17"),
        ("optimal_tea", {"scale": "group_std", "alpha": 1.0}, 2, r"group_size to 3"),
    ],
)
def test_groups_too_small_say_what_to_change(name, kwargs, group_size, message):
    with pytest.raises(ValueError, match=message):
        build_estimator(name, **kwargs)(torch.zeros(1, group_size))


def test_estimators_of_the_family_agree_as_the_group_grows():
    rewards = torch.randn(2_000, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direct = Direct()(rewards)
    closeness = torch.nn.functional.cosine_similarity(CalibratedTEA()(rewards), direct, dim=1)
    assert closeness.mean() > 0.98


# ---------------------------------------------------------------- constants


@pytest.mark.parametrize(
    ("m", "k", "scale"), [(16, 4, "tail_rms"), (32, 8, "tail_std"), (12, 6, "group_std"), (16, 16, "group_std")]
)
def test_shipped_constants_are_those_of_the_code(m, k, scale):
    with np.load(optimal_tea.SHIPPED) as shipped:
        assert f"{optimal_tea.constant_name(m, k, scale)}/signal" in shipped
    shipped_moments = optimal_tea.constants(m, k, scale)
    np.testing.assert_allclose(shipped_moments.signal, signal_matrix(m, k, scale), rtol=0, atol=1e-10)
    noise, unrelated = noise_matrices(m, k, scale)
    np.testing.assert_allclose(shipped_moments.noise, noise, rtol=1e-9)
    np.testing.assert_allclose(shipped_moments.unrelated, unrelated, rtol=1e-9)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEALIGHTNING_CACHE", str(tmp_path / "cache"))
    optimal_tea.constants.cache_clear()
    yield tmp_path / "cache"
    optimal_tea.constants.cache_clear()


def test_other_constants_are_computed_once_and_kept_on_disk(cache, monkeypatch):
    first = optimal_tea.constants(13, 4, "tail_rms")
    (file,) = cache.iterdir()
    optimal_tea.constants.cache_clear()
    monkeypatch.setattr(optimal_tea, "tail_moments", lambda *args: pytest.fail("computed again"))
    again = optimal_tea.constants(13, 4, "tail_rms")
    for field in ("signal", "noise", "unrelated"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert file.suffix == ".npz"


@pytest.mark.parametrize("content", [b"", b"no archive", "truncated"])
def test_a_broken_file_on_disk_is_replaced(cache, content):
    optimal_tea.constants(13, 4, "tail_rms")
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:500] if content == "truncated" else content)
    optimal_tea.constants.cache_clear()
    moments = optimal_tea.constants(13, 4, "tail_rms")
    np.testing.assert_allclose(moments.signal, tail_moments(13, 4, "tail_rms").signal)
    with np.load(file) as repaired:
        assert "signal" in repaired


def test_a_disk_that_takes_no_files_is_no_error(cache):
    cache.write_text("a file where the folder should be")
    assert optimal_tea.constants(13, 4, "tail_rms").signal.shape == (2, 6)
