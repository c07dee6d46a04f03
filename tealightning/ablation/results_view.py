"""Look things up in the results of an ablation (`results.json`, docs/ablations-results.md)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tealightning.reporting.tables import csv_text

Results = Mapping[str, Any]
Estimate = Mapping[str, Any]  # mean, low, high, se; all but the mean may be null

START = "(start)"  # the policy before training, where a variant's name would stand; no variant can be called so
START_LABEL = "before training"

DIAGNOSTICS = {
    "kl": "KL to the start, nats a completion",
    "kl_per_token": "KL, nats a token",
    "completion_length": "length, tokens",
    "truncated_fraction": "truncated",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_similarity": "self-similarity",
    "reward_std": "reward spread",
    "unscorable_fraction": "unscorable",
}
BUDGETS = {
    "optimizer_steps": "optimizer steps",
    "rollouts": "rollouts",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "wall_seconds": "wall seconds",
}
CSV_COLUMNS = ("split", "variant", "quantity", "n", "mean", "low", "high", "se", "p_value", "p_adjusted", "kl")


def label(results: Results, variant: str) -> str:
    """How a variant is called in tables and plots."""
    return START_LABEL if variant == START else str((results.get("labels") or {}).get(variant, variant))


def interval_name(results: Results) -> str:
    """`95%`."""
    return f"{100 * results.get('confidence', 0.95):g}%"


def split_name(split: str) -> str:
    """`val` -> `validation prompts`; other keys name themselves."""
    return {"val": "validation prompts", "test": "held-out prompts"}.get(split, f"{split} prompts")


def main_split(results: Results) -> str | None:
    """The first split; None if nothing was evaluated."""
    return next(iter(results.get("splits") or {}), None)


def evaluated(results: Results, split: str, *, start: bool = False) -> dict[str, Mapping[str, Any]]:
    """Every policy that was evaluated on a split, in the order of the spec; with `start`, the policy before training
    comes first."""
    content = results["splits"][split]
    policies = {START: content["start"]} if start and content.get("start") else {}
    trained = content.get("variants") or {}
    return policies | {name: trained[name] for name in results["variants"] if name in trained}


def at(estimates: Sequence[Estimate] | None, n: int) -> Estimate | None:
    """The estimate at n; None if there is none or its mean is not known."""
    return next((one for one in estimates or () if one["n"] == n and one["mean"] is not None), None)


def at_n(results: Results, split: str, quantity: str, n: int | None = None) -> dict[str, Estimate]:
    """A quantity of every variant that has it, at n (None = the headline n)."""
    n = results["headline_n"] if n is None else n
    policies = evaluated(results, split).items()
    return {name: one for name, policy in policies if (one := at(policy.get(quantity), n)) is not None}


def equal_kl_of(results: Results) -> Mapping[str, Any]:
    """The comparison at equal KL, empty where there is none."""
    return results.get("equal_kl") or {"kls": [], "variants": {}}


def is_significant(results: Results, difference: Estimate | None) -> bool:
    """True if a difference's corrected p-value is below 1 - confidence."""
    p_value = None if difference is None else difference.get("p_adjusted")
    return p_value is not None and p_value < 1 - results.get("confidence", 0.95)


def to_csv(results: Results) -> str:
    """Every estimate of the tables in long format, with every digit: reading a number back gives that of results.json.

    The policy before training is the variant `(start)`. `quantity` is the key of results.json, with a dot where it is a
    part of another: `against_reference.win_rate`, `diagnostics.kl`, `budgets.rollouts`.
    """
    return csv_text(list(_csv_rows(results)), CSV_COLUMNS)


def _csv_rows(results: Results) -> Iterator[dict[str, Any]]:
    for split in results.get("splits") or {}:
        for name, policy in evaluated(results, split, start=True).items():
            yield from ({"split": split, "variant": name} | row for row in _policy_rows(policy))
    for name, points in equal_kl_of(results)["variants"].items():
        for point in filter(None, points or ()):
            for quantity in ("best_of_n", "against_reference"):
                place = {"split": main_split(results), "variant": name, "kl": point["kl"]}
                rows = (_csv_row(f"equal_kl.{quantity}", one) for one in point.get(quantity) or ())
                yield from (place | row for row in rows)
    for name, spent in (results.get("budgets") or {}).items():
        yield from ({"variant": name, "quantity": f"budgets.{key}", "mean": spent.get(key)} for key in BUDGETS)


def _policy_rows(policy: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one policy on one split."""
    for quantity in ("best_of_n", "gold_best_of_n", "against_reference", "against_start"):
        for one in policy.get(quantity) or ():
            yield _csv_row(quantity, one)
            parts = [part for part in ("probability_of_improvement", "win_rate") if one.get(part)]
            yield from ({"n": one["n"]} | _csv_row(f"{quantity}.{part}", one[part]) for part in parts)
    diagnostics = policy.get("diagnostics") or {}
    yield from (_csv_row(f"diagnostics.{key}", diagnostics[key]) for key in DIAGNOSTICS if diagnostics.get(key))


def _csv_row(quantity: str, estimate: Estimate) -> dict[str, Any]:
    return {"quantity": quantity} | {key: estimate[key] for key in CSV_COLUMNS if key in estimate}
