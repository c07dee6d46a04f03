"""Unbiased best-of-n, its selection by a proxy, and comparisons of two policies, against brute force."""

import itertools
from itertools import combinations

import pytest
import torch
from scipy.special import gammaln

from tealightning.functional.best_of_n import (
    best_of_n,
    best_of_n_selected,
    best_of_n_weights,
    holm,
    improvement,
    win_rate,
)


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


NAN = float("nan")


def brute_selected(proxy, other, n):
    samples = [(p, o) for p, o in zip(proxy, other, strict=True) if p == p and o == o]
    total, count = 0.0, 0
    for subset in combinations(samples, n):
        top = max(p for p, _ in subset)
        tied = [o for p, o in subset if p == top]
        total, count = total + sum(tied) / len(tied), count + 1
    return total / count if count else NAN


def test_best_of_n_selected_equals_all_subsets_with_ties():
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randint(0, 4, (6, 8), generator=generator).double()
    other = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    other[0, 3], other[2, 0], proxy[1, 5] = NAN, NAN, NAN
    ns = [1, 2, 3, 5, 8]
    expected = [[brute_selected(p, o, n) for n in ns] for p, o in zip(proxy.tolist(), other.tolist(), strict=True)]
    measured = best_of_n_selected(proxy, other, ns)
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_best_of_n_selected_by_itself_is_best_of_n():
    rewards = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    valid = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.8
    ns = [1, 4, 16, 60]
    expected = best_of_n(rewards, ns, valid)
    assert expected.isnan().any() and not expected.isnan().all()
    measured = best_of_n_selected(rewards, rewards, ns, valid)
    torch.testing.assert_close(measured, expected, rtol=0, atol=0, equal_nan=True)


def test_best_of_n_selected_falls_where_the_proxy_is_wrong():
    proxy, gold = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 3.0, -3.0]])
    # n = 2: the pairs pick 3, -3, -3.
    torch.testing.assert_close(
        best_of_n_selected(proxy, gold, [1, 2, 3]), torch.tensor([[0.0, -1.0, -3.0]], dtype=torch.float64)
    )


def test_best_of_n_selected_keeps_samples_of_infinitely_low_proxy():
    proxy, gold = torch.tensor([[NAN, float("-inf"), 1.0]]), torch.tensor([[7.0, 4.0, 2.0]])
    torch.testing.assert_close(best_of_n_selected(proxy, gold, [1, 2]), torch.tensor([[3.0, 2.0]], dtype=torch.float64))


def test_best_of_n_selected_of_no_samples_is_nan():
    assert best_of_n_selected(torch.zeros(1, 2), torch.full((1, 2), NAN), [1]).isnan().all()


def test_best_of_n_selected_says_what_is_wrong():
    with pytest.raises(ValueError, match="same samples"):
        best_of_n_selected(torch.zeros(1, 2), torch.zeros(1, 3), [1])
    with pytest.raises(ValueError, match="ns: expected"):
        best_of_n_selected(torch.zeros(1, 2), torch.zeros(1, 2), [0])


def brute_win_rate(first, second, n):
    first, second = ([x for x in samples if x == x] for samples in (first, second))
    pairs = [(max(a), max(b)) for a in combinations(first, n) for b in combinations(second, n)]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else NAN


def test_win_rate_equals_all_pairs_of_subsets():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 5, (6, 7), generator=generator).double()  # five values: many ties
    second = torch.randint(0, 5, (6, 5), generator=generator).double()
    first[1, 2], second[2, 0], second[2, 4] = NAN, NAN, NAN
    ns = [1, 2, 3, 5, 6]
    expected = [[brute_win_rate(a, b, n) for n in ns] for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    torch.testing.assert_close(win_rate(first, second, ns), torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_win_rate_splits_ties_and_adds_up_to_one():
    same = torch.ones(1, 4)
    assert win_rate(same, same, [1, 4]).tolist() == [[0.5, 0.5]]
    first, second = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(win_rate(first, second, [1, 2]), torch.tensor([[0.5, 1.0]], dtype=torch.float64))
    other = win_rate(second, first, [1, 2])
    torch.testing.assert_close(other, torch.tensor([[0.5, 0.0]], dtype=torch.float64))


def test_win_rate_of_more_than_the_samples_is_nan():
    assert win_rate(torch.zeros(1, 3), torch.zeros(1, 2), [3]).isnan().all()
    assert win_rate(torch.full((1, 3), NAN), torch.zeros(1, 2), [1]).isnan().all()


def test_win_rate_of_large_samples_matches_simulation():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    draws = 20000
    best = [
        samples[0, torch.rand(draws, 512, generator=generator).topk(16, dim=1).indices].max(dim=1).values
        for samples in (first, second)
    ]
    simulated = (best[0] > best[1]).double().mean().item()
    assert win_rate(first, second, [16]).item() == pytest.approx(simulated, abs=0.015)


def test_win_rate_says_what_is_wrong():
    with pytest.raises(ValueError, match="same prompts"):
        win_rate(torch.zeros(2, 3), torch.zeros(1, 3), [1])
    with pytest.raises(ValueError, match="ns: expected"):
        win_rate(torch.zeros(2, 3), torch.zeros(2, 3), [0])


def test_improvement_counts_ties_half_and_keeps_nan():
    first = torch.tensor([2.0, 1.0, 0.0, NAN, 1.0])[None, :, None]
    second = torch.tensor([1.0, 1.0, 1.0, 1.0, NAN])[None, :, None]
    expected = torch.tensor([1.0, 0.5, 0.0, NAN, NAN], dtype=torch.float64)
    torch.testing.assert_close(improvement(first, second)[0, :, 0], expected, equal_nan=True)
    with pytest.raises(ValueError, match="same seeds"):
        improvement(first, second[:, :2])


def test_holm_multiplies_by_the_tests_left():
    adjusted = holm(torch.tensor([0.01, NAN, 0.04, 0.03, 0.005], dtype=torch.float64))
    expected = torch.tensor([0.03, NAN, 0.06, 0.06, 0.02], dtype=torch.float64)
    torch.testing.assert_close(adjusted, expected, equal_nan=True)


def test_holm_stays_at_most_one_and_takes_no_tests():
    assert holm(torch.tensor([0.6, 0.7])).tolist() == [1.0, 1.0]
    assert holm(torch.tensor([NAN])).isnan().all() and len(holm(torch.tensor([]))) == 0
