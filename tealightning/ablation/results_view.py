"""Look things up in the results of an ablation (`results.json`, docs/ablations-results.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    """What is known of every variant on a split, in the order of the spec; with `start`, before them the policy before
    training.

    A variant without an evaluation on this split is left out.
    """
    found = results["splits"][split]
    policies = {START: found["start"]} if start and found.get("start") else {}
    known = found.get("variants") or {}
    return policies | {name: known[name] for name in results["variants"] if name in known}


def at(estimates: Sequence[Estimate] | None, n: int) -> Estimate | None:
    """The estimate at n; None if there is none or its mean is not known."""
    return next((found for found in estimates or () if found["n"] == n and found["mean"] is not None), None)


def budgets_of(results: Results, split: str, quantity: str = "best_of_n") -> list[int]:
    """Every n at which some policy of the split has `quantity`, ascending."""
    policies = evaluated(results, split, start=True).values()
    return sorted({found["n"] for policy in policies for found in policy.get(quantity) or ()})


def unfinished(results: Results) -> list[Mapping[str, Any]]:
    """Runs that failed, then runs that are missing."""
    runs = [run for run in results.get("runs") or () if run["status"] != "finished"]
    return sorted(runs, key=lambda run: run["status"] != "failed")


def is_significant(results: Results, difference: Estimate | None) -> bool:
    """True if a difference's corrected p-value is below 1 - confidence."""
    p_value = None if difference is None else difference.get("p_adjusted")
    return p_value is not None and p_value < 1 - results.get("confidence", 0.95)
