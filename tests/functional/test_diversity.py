import random
import time

import pytest
import torch

from tealightning.functional.diversity import distinct_n, self_similarity

NAN = float("nan")


def close(measured, expected):
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_distinct_n_is_the_share_of_different_ngrams():
    groups = [[[1, 2, 1], [1, 2]], [[5, 5, 5, 5]], [[], []], [[1], [2]]]
    close(distinct_n(groups, 1), [2 / 5, 1 / 4, NAN, 1.0])
    close(distinct_n(groups, 2), [2 / 3, 1 / 3, NAN, NAN])  # 12, 21, 12


def test_self_similarity_is_the_mean_jaccard_of_pairs():
    groups = [
        [[1, 2, 3], [1, 2, 4], [1, 2, 3]],  # {12, 23}, {12, 24}, {12, 23}: 1/3, 1, 1/3
        [[1, 2], [3, 4]],
        [[1, 2, 3]],
        [],
    ]
    close(self_similarity(groups), [(1 / 3 + 1 + 1 / 3) / 3, 0.0, NAN, NAN])


def test_self_similarity_compares_short_completions_whole():
    close(self_similarity([[[1], [1]], [[1], [2]], [[], []], [[1], []], [[1], [1, 1]]]), [1.0, 0.0, 1.0, 0.0, 0.0])
    close(self_similarity([[[1, 2], [2, 1]]], n=1), [1.0])


@pytest.mark.parametrize("measure", [distinct_n, self_similarity])
def test_diversity_says_what_is_wrong(measure):
    with pytest.raises(ValueError, match="n: expected"):
        measure([[[1, 2]]], n=0)


def test_diversity_of_an_evaluation_is_fast():
    rng = random.Random(0)
    groups = [[[rng.randrange(50) for _ in range(32)] for _ in range(32)] for _ in range(48)]
    start = time.process_time()
    similarity, distinct = self_similarity(groups), distinct_n(groups, 2)
    assert time.process_time() - start < 1.0
    # 992 draws of 2500 bigrams hit 2500 * (1 - exp(-992/2500)) = 819 of them.
    assert distinct.mean().item() == pytest.approx(819 / 992, abs=0.02)
    assert 0 < similarity.mean() < 0.02 and len(distinct) == 48
