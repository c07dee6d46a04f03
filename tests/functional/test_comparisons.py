from itertools import combinations

import pytest
import torch

from tealightning.functional.best_of_n import holm, improvement, win_rate

NAN = float("nan")


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
