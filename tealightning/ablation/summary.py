"""Summarise the results of an ablation in sentences made from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from tealightning.ablation.results_view import (
    BUDGETS,
    START,
    Estimate,
    Results,
    at,
    evaluated,
    interval_name,
    is_significant,
    label,
    main_split,
    split_name,
)
from tealightning.ablation.table_formats import rounded


def summary(results: Results) -> list[str]:
    """The findings as sentences: who leads, what survives the correction, the start, gold, equal KL, held-out prompts.

    Nothing is said about what was not measured.
    """
    split = main_split(results)
    if split is None or not evaluated(results, split):
        return ["No run has finished: there is nothing to compare yet."]
    sentences = [
        leader(results, split),
        setting(results, split),
        *corrected(results, split),
        *mean_leader(results, split),
    ]
    sentences += [*against_start(results, split), *gold_leader(results, split), *equal_kl_leader(results)]
    others = [other for other in results["splits"] if other != split and evaluated(results, other)]
    return sentences + [leader(results, other) for other in others]


def setting(results: Results, split: str) -> str:
    """How much was run and measured."""
    found = results["splits"][split]
    seeds = sorted({len(policy["seeds"]) for policy in evaluated(results, split).values()})
    few = "" if seeds[0] == seeds[-1] else f"{seeds[0]} to "
    return (
        f"Compared are {counted(len(results['variants']), 'variant')} with {few}{counted(seeds[-1], 'finished seed')} "
        f"each, {equal_words(results)} a run, on {found['num_prompts']} {split_name(split)} with "
        f"{found['samples_per_prompt']} samples a prompt; {interval_name(results)} intervals in brackets."
    )


def equal_words(results: Results) -> str:
    """`40 optimizer steps`."""
    equal = results["equal"]
    return f"{equal['amount']:,} {BUDGETS.get(equal['what'], equal['what'])}"


def leader(results: Results, split: str) -> str:
    """Who has the highest best-of-n at the headline n, and by how much against the reference."""
    n, reference = results["headline_n"], results["reference"]
    best = highest(evaluated(results, split), "best_of_n", n)
    if best is None:
        return f"There is no best-of-{n} on the {split_name(split)}."
    name, value = best
    text = f"At n = {n} on the {split_name(split)}, {label(results, name)} has the highest best-of-n, {in_words(value)}"
    if name == reference:
        second = highest(without(evaluated(results, split), name), "best_of_n", n)
        return f"{text}{runner_up(results, split, second)}."
    difference = at(evaluated(results, split)[name].get("against_reference"), n)
    if difference is None:
        return f"{text}."
    return f"{text}: {signed(difference)} over {label(results, reference)}{p_words(difference)}."


def runner_up(results: Results, split: str, second: tuple[str, Estimate] | None) -> str:
    """How far behind the second is, where the reference leads."""
    if second is None:
        return ""
    difference = at(evaluated(results, split)[second[0]].get("against_reference"), results["headline_n"])
    gap = "" if difference is None else f", {signed(difference)} against it{p_words(difference)}"
    return f"; second is {label(results, second[0])}{gap}"


def corrected(results: Results, split: str) -> list[str]:
    """Which differences to the reference survive the correction, or that none does."""
    n, reference = results["headline_n"], label(results, results["reference"])
    found = {name: at(policy.get("against_reference"), n) for name, policy in evaluated(results, split).items()}
    tested = {name: one for name, one in found.items() if one is not None and one.get("p_adjusted") is not None}
    if not tested:
        return (
            [f"Nothing is compared with {reference}, the reference: it has no finished run to compare with."]
            if (results["reference"] not in results["variants"])
            else []
        )
    better = [label(results, name) for name, one in tested.items() if is_significant(results, one) and one["mean"] > 0]
    worse = [label(results, name) for name, one in tested.items() if is_significant(results, one) and one["mean"] < 0]
    if not better and not worse:
        return [
            f"No difference to {reference} at n = {n} survives the correction for "
            f"{counted(len(tested), 'comparison')}: these runs do not tell the variants apart from it."
        ]
    parts = [f"better than {reference}: {listed(better)}", f"worse: {listed(worse)}"]
    rest = len(tested) - len(better) - len(worse)
    parts += [f"not told apart from it: {rest}"] if rest else []
    return [f"After the correction for {counted(len(tested), 'comparison')} at n = {n}, {'; '.join(parts)}."]


def mean_leader(results: Results, split: str) -> list[str]:
    """Who leads at n = 1, which need not be who leads at the headline n."""
    policies, n = evaluated(results, split), results["headline_n"]
    best, headline = highest(policies, "best_of_n", 1), highest(policies, "best_of_n", n)
    if best is None or headline is None or n == 1:
        return []
    same = best[0] == headline[0]
    name = label(results, best[0])
    return [f"{name} leads at n = 1, the mean reward, {'too' if same else 'instead'}: {in_words(best[1])}."]


def against_start(results: Results, split: str) -> list[str]:
    """How many variants are above and below the policy before training, by intervals that exclude 0."""
    n = results["headline_n"]
    found = {name: at(policy.get("against_start"), n) for name, policy in evaluated(results, split).items()}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        return []
    above = [name for name, one in known.items() if (one["low"] or 0) > 0]
    below = [f"{label(results, name)} ({signed(one)})" for name, one in known.items() if (one["high"] or 0) < 0]
    text = (
        f"Training raised best-of-{n} above the starting policy's in {len(above)} of {counted(len(known), 'variant')}"
    )
    text += " (intervals that exclude 0)"
    return [f"{text}; it lowered it in {listed(below)}." if below else f"{text} and lowered it in none."]


def gold_leader(results: Results, split: str) -> list[str]:
    """Who leads by the reward that nobody was trained on, and for whom it fell below the start."""
    n, policies = results["headline_n"], evaluated(results, split)
    best = highest(policies, "gold_best_of_n", n)
    if best is None:
        return []
    start = at((evaluated(results, split, start=True).get(START) or {}).get("gold_best_of_n"), n)
    text = f"By the gold reward, the highest at n = {n} is {label(results, best[0])}, {in_words(best[1])}"
    if start is None:
        return [f"{text}."]
    golds = {name: at(policy.get("gold_best_of_n"), n) for name, policy in policies.items()}
    fell = [label(results, name) for name, gold in golds.items() if gold is not None and gold["mean"] < start["mean"]]
    if not fell:
        return [f"{text}; none is below the mean before training, {in_words(start)}."]
    return [f"{text}; below the mean before training, {in_words(start)}: {listed(fell)}."]


def equal_kl_leader(results: Results) -> list[str]:
    """Who leads at the largest KL that at least two variants reached."""
    equal: Mapping[str, Any] = results.get("equal_kl") or {"kls": [], "variants": {}}
    n = results["headline_n"]
    for kl in reversed(equal["kls"]):
        found = {}
        for name, points in equal["variants"].items():
            reached = next((at(point["best_of_n"], n) for point in points or () if point and point["kl"] == kl), None)
            if reached is not None:
                found[name] = reached
        if len(found) > 1:
            name = max(found, key=lambda key: found[key]["mean"])
            return [
                f"At an equal KL of {kl:.3g} {equal.get('unit', 'nats')}, which {counted(len(found), 'variant')} "
                f"reached, {label(results, name)} has the highest best-of-{n}: {in_words(found[name])}."
            ]
    return []


def highest(policies: Mapping[str, Mapping[str, Any]], quantity: str, n: int) -> tuple[str, Estimate] | None:
    """The variant with the highest mean of `quantity` at n; None if none has it."""
    found = {name: one for name, policy in policies.items() if (one := at(policy.get(quantity), n)) is not None}
    return max(found.items(), key=lambda item: item[1]["mean"], default=None)


def without(policies: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in policies.items() if key != name}


def in_words(estimate: Estimate, sign: str = "") -> str:
    """`1.234 [1.100, 1.300]`."""
    if estimate.get("low") is None or estimate.get("high") is None:
        return f"{sign}{rounded(estimate['mean'])}"
    return f"{sign}{rounded(estimate['mean'])} [{rounded(estimate['low'])}, {rounded(estimate['high'])}]"


def signed(estimate: Estimate) -> str:
    """`+0.123 [0.050, 0.190]`."""
    return in_words(estimate, "+" if estimate["mean"] > 0 else "")


def p_words(difference: Estimate) -> str:
    """` (p = 0.012 after correction)`; empty without a corrected p-value."""
    p_value = difference.get("p_adjusted")
    if p_value is None:
        return ""
    return f" (p {'< 0.001' if p_value < 0.001 else '= ' + rounded(p_value)} after correction)"


def listed(names: Sequence[str], most: int = 6) -> str:
    """`a, b`; `none`; of many the first ones and how many more."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def failures(results: Results, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each run that did not finish: which, and the error; of a traceback its last line."""
    lines = []
    for run in runs:
        error = str(run.get("error") or "").strip()
        error = error.splitlines()[-1] if error.startswith("Traceback") else " ".join(error.split())
        shown = error if len(error) <= 300 else f"{error[:300]} …"
        lines.append(
            f"{label(results, run['variant'])}, seed {run['seed']}: {run['status']}{f': {shown}' if shown else ''}"
        )
    return lines
