"""Diversity of the completions of one prompt: distinct n-grams and pairwise overlap, of token ids.

`groups` are the completions of each of P prompts; results are [P] float64. A length n below 1 is a ValueError.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

Completion = Sequence[int]


def distinct_n(groups: Sequence[Sequence[Completion]], n: int) -> Tensor:
    """Distinct n-grams over all n-grams of a group: 1 = none repeats, near 0 = all the same, NaN = none is so long.

    Li et al. (2016), "A diversity-promoting objective function for neural conversation models". It falls with the
    number of completions and their length: compare groups of one size only.

    >>> distinct_n([[(1, 2, 3), (1, 2, 4)]], n=2)
    tensor([0.7500], dtype=torch.float64)
    """
    shares = []
    for group in groups:
        grams = [gram for completion in group for gram in _ngrams(completion, n)]
        shares.append(len(set(grams)) / len(grams) if grams else float("nan"))
    return torch.tensor(shares, dtype=torch.float64)


def self_similarity(groups: Sequence[Sequence[Completion]], n: int = 2) -> Tensor:
    """Mean Jaccard similarity of the n-gram sets of two completions of a group: 1 = all the same, 0 = nothing shared.

        mean over pairs i < j of |G_i & G_j| / |G_i | G_j|

    Two completions shorter than n are 1 if they are equal, else 0. NaN for fewer than two completions.

    >>> self_similarity([[(1, 2, 3), (1, 2, 4)]], n=2)
    tensor([0.3333], dtype=torch.float64)
    """
    means = []
    for group in groups:
        # A completion shorter than n stands for itself; by its length it equals no n-gram.
        sets = [frozenset(_ngrams(completion, n)) or frozenset([tuple(completion)]) for completion in group]
        total = 0.0
        for first, second in combinations(sets, 2):
            shared = len(first & second)
            total += shared / (len(first) + len(second) - shared)
        pairs = len(sets) * (len(sets) - 1) // 2
        means.append(total / pairs if pairs else float("nan"))
    return torch.tensor(means, dtype=torch.float64)


def _ngrams(completion: Completion, n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n: expected the length of an n-gram, at least 1, got {n}")
    return list(zip(*(completion[start:] for start in range(n)), strict=False))
