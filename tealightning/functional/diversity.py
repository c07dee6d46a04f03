"""How different the completions of a group are, by their tokens."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Groups = Sequence[Sequence[Sequence[int]]]
"""[prompts][completions][tokens] token ids."""


def distinct_n(groups: Groups, n: int) -> Tensor:
    """Share of distinct n-grams among all n-grams of a group's completions (Li et al. 2016, distinct-n).

    Returns:
        [P] float64 in (0, 1]; NaN where no completion has n tokens.
    """
    values = []
    for group in groups:
        grams = [gram for tokens in group for gram in _n_grams(tokens, n)]
        values.append(len(set(grams)) / len(grams) if grams else float("nan"))
    return torch.tensor(values, dtype=torch.float64)


def self_similarity(groups: Groups, n: int = 2) -> Tensor:
    """Mean Jaccard similarity of the n-gram sets of two completions of a group, over all pairs.

    Completions of fewer than n tokens are compared as a whole: 1 if they are equal, else 0.

    Returns:
        [P] float64 in [0, 1]; NaN for a group of fewer than two.
    """
    values = []
    for group in groups:
        sets = [frozenset(_n_grams(tokens, n)) or frozenset([tuple(tokens)]) for tokens in group]
        pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
        values.append(sum(pairs) / len(pairs) if pairs else float("nan"))
    return torch.tensor(values, dtype=torch.float64)


def _n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
