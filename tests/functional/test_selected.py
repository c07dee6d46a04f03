from itertools import combinations

import pytest
import torch

from tealightning.functional.best_of_n import best_of_n, best_of_n_selected

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
