"""Check whether a reward's upper tail is what the tail estimators assume, ties included.

Estimators read the differences between the best scores, the upper `alpha` of a group (rounding makes them equal), and
assume that the upper `2 alpha` of the distribution is Gaussian: ties and predictions are those of the upper alpha,
line, shape and clusters those of the `tested_share`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tealightning.functional import tail_shape
from tealightning.functional.moments import below_and_tied
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import tail_size

TieCause = Literal["bfloat16", "float16", "float32", "ceiling", "grid"]
TIE_CAUSES: tuple[TieCause, ...] = get_args(TieCause)

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
MORE_THAN_A_RUBRIC = 16
"""Distinct scores of a batch beyond which a reward passes for a continuous one."""


def tied(rewards: Tensor, completions: Sequence[str]) -> Tensor:
    """Find ties, [P, m] bool: True where a different completion of the same prompt has exactly the same reward.

    A NaN reward is tied with nothing. `completions` are P * m texts; empty = all different.

    >>> tied(torch.tensor([[1.0, 1.0, 2.0]]), ["a", "b", "c"])
    tensor([[ True,  True, False]])
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
    """Diagnose the `tied` scores of a batch that look like continuous ones which something has made equal; NaN is out.

    - `bfloat16`, `float16`, `float32`: all of them are numbers of that type, and neighbours of that type occur. In
      float32 that is a score that was squashed.
    - `ceiling`: more prompts than not have several best completions, at the batch's highest score, and other scores are
      seldom tied: a clip.
    - `grid`: many distinct scores, and ties.

    None without ties, for whole numbers up to 256 in size (counts, right or wrong) and for a few distinct scores with
    gaps between them (a rubric).

    >>> rewards = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    >>> tie_cause(rewards, tied(rewards, []))
    """
    finite = rewards[torch.isfinite(rewards)]
    are_counts = bool(((finite == finite.round()) & (finite.abs() <= 256)).all())
    if are_counts or not bool(ties.any()):
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


def _is_rounded_to(distinct: Tensor, name: str) -> bool:
    """Whether [n] sorted values are all of that type, with two that are next to each other in it."""
    if not torch.equal(distinct.to(getattr(torch, name)).double(), distinct):
        return False
    gaps = distinct.diff()
    exponents = torch.frexp(torch.maximum(distinct[:-1].abs(), distinct[1:].abs())).exponent
    spacing = torch.ldexp(torch.ones_like(gaps), exponents - SIGNIFICANT_BITS[name])
    return bool((gaps <= spacing).any())


MIN_TAIL = 4
"""Fewest samples in a tail whose line and shape are looked at."""
REJECTED_BELOW = 0.05
"""A prompt's QQ line is rejected if a smaller share of Gaussian samples is less straight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TailChecks:
    """The checks of Q prompts with M samples each. What M is too small for is None; a prompt without spread is NaN."""

    rows: Tensor  # [Q] int64, the rows of `rewards` that have at least M samples
    samples: Tensor  # [Q, M] float64, M valid ones of each, in random order
    tail: Tensor  # [Q, k] float64, the k = ceil(alpha * M) largest, largest first
    tested_share: float  # upper share of the samples whose line and shape were looked at
    tested: Tensor  # [Q, K] float64, the K = ceil(tested_share * M) largest, largest first
    atoms: Tensor  # [Q] float64, share of the tested samples at their most frequent value
    two_clusters: Tensor  # [Q] float64, share of the tested samples' variance between two clusters
    ties: Tensor  # [Q] float64, share of the tail whose value another sample of the prompt has too
    distinct: Tensor  # [Q] int64, different values among the M
    distinct_in_tail: Tensor  # [Q] int64, the same among the tail's k
    distinct_in_all: int  # different values among all samples of all prompts
    qq_r2: Tensor | None  # [Q] float64
    qq_p: Tensor | None  # [Q] float64, share of Gaussian samples whose QQ line is less straight
    shapes: Tensor | None  # [Q] float64, `pwm_shape`, noisy and not corrected for bias
    shape: tail_shape.ShapeFit | None  # pooled and corrected
    held_out: tail_shape.HeldOut | None  # None if M < 2m


def check_tail(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    m: int = 16,
    alpha: float = 0.25,
    tested_share: float | None = None,
    ns: Sequence[int] | None = None,
    seed: int = 0,
) -> TailChecks:
    """Run all checks of the upper tail against Gaussian samples of the same size; `equal_samples` sets one M.

    Best-of-n is predicted from m samples, for budgets of at most M - m (None = `prediction_budgets`). Line and shape
    are those of the upper `tested_share` (None = 2 alpha, at most 1). A ValueError if m is too small for a tail of 2,
    or a budget too large.

    >>> check_tail(torch.randn(50, 64)).tail.shape
    torch.Size([50, 16])
    """
    if tail_size(alpha, m) < 2:
        raise ValueError(f"a tail of fewer than 2 of m={m} samples has no spread at alpha={alpha}; raise m or alpha.")
    rows, samples = equal_samples(rewards, valid, seed)
    size = samples.shape[1]
    share = min(1.0, 2 * alpha) if tested_share is None else tested_share
    tail, tested = (samples.topk(min(tail_size(part, size), size), dim=1).values for part in (alpha, share))
    k = tested.shape[1]
    line = level = shapes = shape = held_out = None
    if k >= MIN_TAIL:
        line, shapes = tail_shape.qq_r2(tested, size), tail_shape.pwm_shape(tested)
        null = tail_shape.gaussian_tail_null(size, k).r2
        level = (torch.searchsorted(null, line).double() / len(null)).masked_fill(line.isnan(), float("nan"))
        shape = tail_shape.pooled_shape(shapes, size, k)
    if size >= 2 * m:
        budgets = tuple(ns) if ns is not None else tail_shape.prediction_budgets(m, size)
        if not all(1 <= n <= size - m for n in budgets):
            raise ValueError(f"ns must lie between 1 and M - m = {size} - {m} = {size - m}, got {list(budgets)}.")
        held_out = tail_shape.held_out_best_of_n(samples, m, alpha=alpha, ns=budgets)
    return TailChecks(
        rows=rows,
        samples=samples,
        tail=tail,
        tested_share=share,
        tested=tested,
        atoms=tail_shape.largest_atom(tested) if k else tested.new_empty(0),
        two_clusters=tail_shape.two_cluster_share(tested),
        ties=_tied_share(samples, tail),
        distinct=_num_distinct(samples),
        distinct_in_tail=_num_distinct(tail),
        distinct_in_all=samples.unique().numel(),
        qq_r2=line,
        qq_p=level,
        shapes=shapes,
        shape=shape,
        held_out=held_out,
    )


def equal_samples(rewards: Tensor, valid: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the same number M of valid, finite samples from each prompt, in an order that does not depend on theirs.

    M is the one that keeps the most samples in all: `M * (prompts with at least M)`. Of a prompt with more, M are
    drawn; a prompt with fewer is left out.

    Returns: rows [Q] int64 and samples [Q, M] float64, on the CPU; M = 0 without any valid sample.

    >>> rows, samples = equal_samples(torch.tensor([[1.0, 2.0], [3.0, float("nan")], [4.0, 5.0]]))
    >>> rows
    tensor([0, 2])
    """
    values = rewards.detach().double().cpu()
    scored = torch.isfinite(values) if valid is None else torch.isfinite(values) & valid.bool().cpu()
    counts = scored.sum(dim=1)
    width = values.shape[1]
    kept = torch.tensor([size * int((counts >= size).sum()) for size in range(width + 1)])
    size = int(kept.argmax())
    rows = (counts >= size).nonzero().squeeze(1) if size else counts.new_empty(0)
    ascending = values.masked_fill(~scored, float("inf")).sort(dim=1).values[rows]
    # Without the checksum every data set would have its samples of given ranks in the same groups.
    rng = np.random.default_rng([seed, zlib.crc32(ascending.numpy().tobytes())])
    draws = torch.from_numpy(rng.random((len(rows), width)))
    is_padding = torch.arange(width) >= counts[rows, None]
    order = draws.masked_fill(is_padding, 2.0).argsort(dim=1)[:, :size]
    return rows, ascending.gather(1, order)


def _tied_share(samples: Tensor, tail: Tensor) -> Tensor:
    """Share of each tail whose value at least one other of the prompt's samples has too."""
    return (below_and_tied(tail, samples)[1] > 1).double().mean(dim=1)


def _num_distinct(samples: Tensor) -> Tensor:
    """How many different values each row has, [Q] int64."""
    return (samples.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1) + min(samples.shape[1], 1)


def summarise(checks: TailChecks) -> dict[str, Tensor]:
    """Average `checks` over prompts: float64 scalars by metric key; predictions at the largest n.

    `metrics.TailFit` says what they mean. What M is too small for has no key.

    >>> samples = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    >>> round(summarise(check_tail(samples))["tail_qq_r2"].item(), 3)
    0.967
    """
    result = {"tail_ties": mean_over_prompts(checks.ties).mean}
    if checks.qq_r2 is not None and checks.qq_p is not None and checks.shape is not None:
        rejected = (checks.qq_p < REJECTED_BELOW).double().masked_fill(checks.qq_p.isnan(), float("nan"))
        result["tail_qq_r2"] = mean_over_prompts(checks.qq_r2).mean
        result["tail_qq_rejected"] = mean_over_prompts(rejected).mean
        result["tail_shape"] = checks.shape.shape
        result["tail_shape_se"] = checks.shape.standard_error
        result["tail_shape_gaussian"] = checks.shape.gaussian
    if checks.held_out is not None:
        error = mean_over_prompts(checks.held_out.error[:, -1])
        result["tail_prediction_error"] = error.mean
        result["tail_prediction_error_se"] = error.standard_error
        result["tail_prediction_error_gaussian"] = checks.held_out.gaussian_error[-1]
        result["tail_coverage"] = mean_over_prompts(checks.held_out.covered[:, -1]).mean
    return result
