import itertools

import pytest
import torch
from scipy.special import gammaln

from tealightning.functional.best_of_n import best_of_n, best_of_n_weights


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_best_of_n_is_the_mean_maximum_over_subsets(n):
    rewards = torch.randn(7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    subsets = [max(rewards[list(s)].tolist()) for s in itertools.combinations(range(7), n)]
    assert best_of_n(rewards[None], [n]).item() == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_best_of_4_of_one_correct_in_four_is_exactly_one():
    """A bootstrap would say 0.68 (verl #7240)."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    assert best_of_n(rewards, [1, 2, 4]).tolist() == [[0.25, 0.5, 1.0]]


def test_best_of_n_of_constant_rewards_is_exactly_the_constant():
    rewards = torch.full((1, 1000), 0.1, dtype=torch.float64)
    assert best_of_n(rewards, [1, 3, 100, 1000]).tolist() == [[0.1, 0.1, 0.1, 0.1]]


def test_best_of_n_counts_valid_samples_per_prompt():
    rewards = torch.tensor([[5.0, 1.0, 3.0, 9.0], [5.0, 1.0, 3.0, 9.0], [5.0, 1.0, 3.0, 9.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False], [False, False, False, False]])
    values = best_of_n(rewards, [1, 3, 4], valid)
    expected = torch.tensor([[4.5, 8.0, 9.0], [3.0, 5.0, float("nan")], [float("nan")] * 3], dtype=torch.float64)
    torch.testing.assert_close(values, expected, equal_nan=True)


def test_best_of_n_ignores_what_is_under_the_mask():
    rewards = torch.tensor([[2.0, float("nan"), 1.0, float("inf")]])
    assert best_of_n(rewards, [2], torch.tensor([[True, False, True, False]])).item() == 2.0


@pytest.mark.parametrize("n", [1, 2, 100, 5000, 20000])
def test_best_of_n_weights_are_safe_for_many_samples(n):
    weights = best_of_n_weights(torch.tensor([20000]), 20000, n)[0]
    assert torch.isfinite(weights).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    rank = 7 if n <= 20000 - 7 else 0
    log_weight = log_binomial(20000 - 1 - rank, n - 1) - log_binomial(20000, n)
    assert weights[rank].log().item() == pytest.approx(log_weight, abs=1e-8)


def log_binomial(n: int, k: int) -> float:
    return float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def test_best_of_n_is_unbiased():
    """A fair coin: E[max of n] = 1 - 2^-n, from the exact sum over all samples of five tosses."""
    tosses = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    means = best_of_n(tosses, [1, 2, 3, 4, 5]).mean(0)
    torch.testing.assert_close(means, 1 - 0.5 ** torch.arange(1, 6, dtype=torch.float64))
