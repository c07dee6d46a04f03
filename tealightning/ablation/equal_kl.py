"""Compare variants at equal KL from the starting policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tealightning.ablation.collect import EvaluationData, Runs, common_prompts, rewards_of, rows_of
from tealightning.ablation.estimates import Estimator, numbers
from tealightning.functional.best_of_n import best_of_n

NUM_KLS = 5

KLCurve = tuple[Tensor, Tensor]
"""KL [K] in nats a completion, rising, and best-of-n [K, Q, len(ns)], of one run."""


def equal_kl(
    runs: Mapping[str, Runs],
    references: Mapping[str, str | None],
    ns: Sequence[int],
    kls: Sequence[float] | None,
    estimator: Estimator,
) -> dict[str, Any] | None:
    """Best-of-n of every variant at the same KL to the starting policy: a run's curve, interpolated linearly in the
    square root of the KL between its evaluations, prompt by prompt. Rewards rise about like that root (Gao et al.
    2023); interpolating in the KL itself would understate the variants that move far between two evaluations.

    A variant has no value where one of its seeds never got so far. Differences to its reference are paired by seed and
    prompt.

    Args:
        runs: Variant -> its finished runs.
        references: Variant -> the one that it is compared with.
        ns: Best-of-n budgets.
        kls: Where to compare; None = evenly up to the median over variants of the KL that all of a variant's seeds
            reached.
        estimator: Means with intervals.

    Returns:
        `equal_kl` of results.json; None if a run has no KL, or nothing has moved.
    """
    keys = common_prompts([e for r in runs.values() for part in (r.starts, *r.all_points) for e in part])
    curves: dict[str, dict[int, KLCurve]] = {}
    for name, own in runs.items():
        found = [kl_curve([start, *during], keys, ns) for start, during in zip(own.starts, own.all_points, strict=True)]
        if any(curve is None for curve in found):
            return None
        curves[name] = {seed: curve for seed, curve in zip(own.seeds, found, strict=True) if curve is not None}
    reach = {name: min(float(kl.max()) for kl, _ in own.values()) for name, own in curves.items()}
    if kls is None:
        top = float(np.median(list(reach.values())))
        kls = [float(f"{top * (i + 1) / NUM_KLS:.3g}") for i in range(NUM_KLS)] if top > 0 else []
    if not kls:
        return None
    variants = {}
    for name, own_curves in curves.items():
        reference = references.get(name)
        others = curves.get(reference, {}) if reference else {}
        variants[name] = [
            {
                "kl": kl,
                "best_of_n": estimator.curve(torch.stack([at_kl(curve, kl) for curve in own_curves.values()]), ns),
                "against_reference": _against(own_curves, others, kl, ns, estimator)
                if reference and kl <= reach.get(reference, -1.0)
                else None,
            }
            if kl <= reach[name]
            else None
            for kl in kls
        ]
    return {"kls": list(kls), "unit": "nats a completion", "variants": variants}


def kl_curve(evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int]) -> KLCurve | None:
    """The curve of one run through its evaluations in the order of training; None without KL.

    Where the KL falls back below an earlier one, the later evaluation is left out."""
    if any("kl" not in e.columns for e in evaluations):
        return None
    kls = [float(e.columns["kl"][rows_of(e, keys)].mean()) for e in evaluations]
    rising = [i for i, kl in enumerate(kls) if kl > max(kls[:i], default=-1.0)]
    rewards = [rewards_of(evaluations[i], keys) for i in rising]
    reached = torch.tensor([kls[i] for i in rising], dtype=torch.float64)
    return reached, torch.stack([best_of_n(r, ns, ~r.isnan()) for r in rewards])


def at_kl(curve: KLCurve, kl: float) -> Tensor:
    """[Q, len(ns)] best-of-n at a KL that the curve reaches; below its first point that point's."""
    kls, values = curve
    if len(kls) == 1:  # a run that never moved
        return values[0]
    roots, root = kls.sqrt(), kl**0.5
    after = int(torch.searchsorted(roots, torch.tensor(root, dtype=roots.dtype)).clamp(1, len(kls) - 1))
    share = (root - float(roots[after - 1])) / float(roots[after] - roots[after - 1])
    return values[after - 1] + max(0.0, share) * (values[after] - values[after - 1])


def _against(
    own: Mapping[int, KLCurve], other: Mapping[int, KLCurve], kl: float, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]] | None:
    """Differences over the seeds that both have; None without any."""
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    interval = estimator.interval(torch.stack([at_kl(own[seed], kl) - at_kl(other[seed], kl) for seed in seeds]))
    p_values = numbers(interval.p_value)
    return [{"n": n} | row | {"p_value": p} for n, row, p in zip(ns, estimator.rows(interval), p_values, strict=True)]
