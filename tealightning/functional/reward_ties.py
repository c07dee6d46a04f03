"""Count ties: rewards that are equal though the completions differ, from rounding, clipping or squashing.

An estimator of the upper tail reads the differences between the best scores of a group, and rounding makes them equal.
Scores that are meant to be equal (right or wrong, a count of points) are not what is looked for here.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

TieCause = Literal["bfloat16", "float16", "float32", "ceiling", "grid"]
TIE_CAUSES: tuple[TieCause, ...] = get_args(TieCause)

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
MORE_THAN_A_RUBRIC = 16
"""Distinct scores of a batch beyond which a reward passes for a continuous one."""


def tied(rewards: Tensor, completions: Sequence[str]) -> Tensor:
    """[P, m] bool: True where another, different completion of the same prompt has exactly the same reward.

    Args:
        rewards: [P, m] float64; NaN = could not be scored, tied with nothing.
        completions: [P * m] texts; empty = all different.
    """
    num_prompts, size = rewards.shape
    texts = list(completions) or [str(i) for i in range(num_prompts * size)]
    result = torch.zeros(rewards.shape, dtype=torch.bool)
    for p, row in enumerate(rewards.tolist()):
        sharing: dict[float, set[str]] = {}
        for i, value in enumerate(row):
            if value == value:  # no NaN
                sharing.setdefault(value, set()).add(texts[p * size + i])
        result[p] = torch.tensor([len(sharing.get(value, ())) > 1 for value in row])
    return result


def tie_cause(rewards: Tensor, ties: Tensor) -> TieCause | None:
    """Why the scores of a batch are tied, if they look like continuous ones that something has made equal.

    - `bfloat16`, `float16`, `float32`: all of them are numbers of that type, and neighbours of that type occur. In
      float32 that is a score that was squashed.
    - `ceiling`: more prompts than not have several best completions, at the batch's highest score, and other scores are
      seldom tied: a clip.
    - `grid`: many distinct scores, and ties.

    None without ties, for whole numbers up to 256 in size (counts, right or wrong) and for a few distinct scores with
    gaps between them (a rubric).

    Args:
        rewards: [P, m] float64; NaN is left out.
        ties: [P, m] bool, of `tied`.
    """
    finite = rewards[torch.isfinite(rewards)]
    if not bool(ties.any()) or _are_counts(finite):
        return None
    distinct = finite.unique()
    for name in SIGNIFICANT_BITS:
        if len(distinct) > 1 and _is_rounded_to(distinct, name):
            return name  # type: ignore[return-value] # the literal of the loop
    highest = rewards == distinct[-1]
    others = torch.isfinite(rewards) & ~highest
    if (highest & ties).any(dim=1).double().mean() > 0.5 and ties[others].double().mean() < 0.1:
        return "ceiling"
    return "grid" if len(distinct) > MORE_THAN_A_RUBRIC else None


def _are_counts(values: Tensor) -> bool:
    return bool(((values == values.round()) & (values.abs() <= 256)).all())


def _is_rounded_to(distinct: Tensor, name: str) -> bool:
    """Whether [n] sorted values are all of that type, with two that are next to each other in it."""
    as_type = distinct.to(getattr(torch, name)).double()
    if not torch.equal(as_type, distinct):
        return False
    gaps = distinct.diff()
    exponents = torch.frexp(torch.maximum(distinct[:-1].abs(), distinct[1:].abs())).exponent
    spacing = torch.ldexp(torch.ones_like(gaps), exponents - SIGNIFICANT_BITS[name])
    return bool((gaps <= spacing).any())
