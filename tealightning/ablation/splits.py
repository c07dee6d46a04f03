"""Analyse one prompt set: curves, paired comparisons and properties of the completions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tealightning.ablation.collect import EvaluationData, Runs, common_prompts, rewards_of, rows_of
from tealightning.ablation.estimates import Estimator, numbers
from tealightning.ablation.plan import Plan
from tealightning.functional.best_of_n import best_of_n, best_of_n_selected, holm, improvement, win_rate

DIAGNOSTICS = ("kl", "kl_per_token", "distinct_1", "distinct_2", "self_similarity")


def split_results(plan: Plan, runs: dict[str, Runs], estimator: Estimator) -> dict[str, Any]:
    """One SPLIT of the schema."""
    ns = plan.spec.evaluation.ns
    every = [e for r in runs.values() for e in (*r.finals, *r.starts)]
    keys = common_prompts(every)
    first = max(runs.values(), key=lambda r: len(r.seeds))  # its starting policies stand for those of all
    variants: dict[str, Any] = {}
    for variant in plan.variants:
        if variant.name not in runs:
            continue
        own = runs[variant.name]
        other = runs.get(variant.reference) if variant.reference else None
        variants[variant.name] = {
            "seeds": own.seeds,
            "reference": variant.reference,
            "best_of_n": _curve(own.finals, keys, ns, estimator),
            "gold_best_of_n": _gold_curve(own.finals, keys, ns, estimator),
            "against_reference": None if other is None else _against(own, other, keys, ns, estimator),
            "against_start": _comparison(own.finals, own.starts, keys, ns, estimator),
            "diagnostics": _diagnostics(own.finals, keys, estimator),
        }
    for what in ("against_reference", "against_start"):
        _adjust(variants, what, plan.spec.evaluation.headline_n)
    return {
        "num_prompts": len(keys),
        "samples_per_prompt": int(every[0].rewards.shape[1]),
        "start": {
            "best_of_n": _curve(first.starts, keys, ns, estimator),
            "gold_best_of_n": _gold_curve(first.starts, keys, ns, estimator),
            "diagnostics": _diagnostics(first.starts, keys, estimator),
        },
        "variants": variants,
    }


def _against(own: Runs, other: Runs, keys: Tensor, ns: Sequence[int], estimator: Estimator) -> Any:
    """Differences over the seeds that both have; None without any."""
    seeds = [seed for seed in own.seeds if seed in other.seeds]
    if not seeds:
        return None
    first = [own.finals[own.seeds.index(seed)] for seed in seeds]
    second = [other.finals[other.seeds.index(seed)] for seed in seeds]
    return _comparison(first, second, keys, ns, estimator)


def _comparison(
    first: Sequence[EvaluationData],
    second: Sequence[EvaluationData],
    keys: Tensor,
    ns: Sequence[int],
    estimator: Estimator,
) -> list[dict[str, Any]]:
    """`first - second`, paired by seed and prompt, a row for each n."""
    a, b = _values(first, keys, ns), _values(second, keys, ns)
    differences = estimator.interval(a - b)
    improved = _probabilities(estimator(improvement(a, b)))
    pairs = zip(first, second, strict=True)
    won = torch.stack([win_rate(rewards_of(x, keys), rewards_of(y, keys), ns) for x, y in pairs])
    wins = _probabilities(estimator(won))
    rows = estimator.rows(differences)
    return [
        {"n": n}
        | rows[i]
        | {
            "p_value": numbers(differences.p_value)[i],
            "p_adjusted": None,
            "probability_of_improvement": improved[i],
            "win_rate": wins[i],
        }
        for i, n in enumerate(ns)
    ]


def _probabilities(rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """Estimates whose bounds stay within 0 and 1: the interval of a mean does not know that it is a probability."""
    for row in rows:
        for name in ("low", "high"):
            bound = row[name]
            row[name] = None if bound is None else min(1.0, max(0.0, bound))
    return rows


def _adjust(variants: dict[str, Any], what: str, headline_n: int | None) -> None:
    """Holm's correction over variants at the headline n."""
    rows = [row for v in variants.values() for row in v[what] or [] if row["n"] == headline_n]
    known = [float("nan") if row["p_value"] is None else row["p_value"] for row in rows]
    p_values = torch.tensor(known, dtype=torch.float64)
    for row, adjusted in zip(rows, numbers(holm(p_values)) if rows else [], strict=True):
        row["p_adjusted"] = adjusted


def _values(evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int]) -> Tensor:
    """[S, Q, len(ns)] best-of-n."""
    return torch.stack([_best(rewards_of(e, keys), ns) for e in evaluations])


def _best(rewards: Tensor, ns: Sequence[int]) -> Tensor:
    return best_of_n(rewards, ns, ~rewards.isnan())


def _curve(
    evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]]:
    return estimator.curve(_values(evaluations, keys, ns), ns)


def _gold_curve(
    evaluations: Sequence[EvaluationData], keys: Tensor, ns: Sequence[int], estimator: Estimator
) -> list[dict[str, Any]] | None:
    """Gold reward of the sample that the proxy picks among n."""
    if any("gold" not in e.columns for e in evaluations):
        return None
    values = [
        best_of_n_selected(rewards_of(e, keys), e.columns["gold"][rows_of(e, keys)], ns, ~rewards_of(e, keys).isnan())
        for e in evaluations
    ]
    return estimator.curve(torch.stack(values), ns)


def _diagnostics(evaluations: Sequence[EvaluationData], keys: Tensor, estimator: Estimator) -> dict[str, Any]:
    """Length, diversity, KL: means over prompts and seeds."""
    rewards = [rewards_of(e, keys) for e in evaluations]

    def column(name: str) -> list[Tensor]:
        return [e.columns[name][rows_of(e, keys)] for e in evaluations]

    values = {
        "completion_length": [lengths.mean(dim=1) for lengths in column("lengths")],
        "truncated_fraction": [truncated.mean(dim=1) for truncated in column("truncated")],
        "reward_std": [_std(r) for r in rewards],
        "unscorable_fraction": [r.isnan().double().mean(dim=1) for r in rewards],
    } | {name: column(name) for name in DIAGNOSTICS if name in evaluations[0].columns}
    found = {name: estimator(torch.stack(rows)[..., None])[0] for name, rows in values.items()}
    return {"kl": None, "kl_per_token": None} | found


def _std(rewards: Tensor) -> Tensor:
    """[Q] standard deviation (ddof 1) of the scored samples."""
    count = (~rewards.isnan()).sum(dim=1)
    deviations = rewards - rewards.nanmean(dim=1, keepdim=True)
    return (deviations.square().nansum(dim=1) / (count - 1).clamp(min=1)).sqrt()
