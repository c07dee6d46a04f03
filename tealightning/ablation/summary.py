"""Summarise the results of an ablation in sentences made from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from tealightning.ablation.results_view import (
    BUDGETS,
    START,
    Estimate,
    Results,
    at,
    at_n,
    equal_kl_of,
    evaluated,
    interval_name,
    is_significant,
    label,
    main_split,
    split_name,
)
from tealightning.reporting.tables import rounded


def summary(results: Results) -> list[str]:
    """The findings as sentences: who leads, what survives the correction, the start, gold, equal KL, held-out prompts.

    Nothing is said about what was not measured.
    """
    split = main_split(results)
    if split is None or not evaluated(results, split):
        return ["No run has finished: there is nothing to compare yet."]
    others = [other for other in results["splits"] if other != split and evaluated(results, other)]
    return [
        _leader(results, split),
        _setting(results, split),
        *_corrected(results, split),
        *_mean_leader(results, split),
        *_against_start(results, split),
        *_gold_leader(results, split),
        *_equal_kl_leader(results),
        *(_leader(results, other) for other in others),
    ]


def failures(results: Results) -> list[str]:
    """A line for each run that did not finish, failed ones first: which, and the error; of a traceback its last
    line."""
    runs = [run for run in results.get("runs") or () if run["status"] != "finished"]
    lines = []
    for run in sorted(runs, key=lambda run: run["status"] != "failed"):
        error = str(run.get("error") or "").strip()
        error = error.splitlines()[-1] if error.startswith("Traceback") else " ".join(error.split())
        reason = f": {error[:300]}{' …' if len(error) > 300 else ''}" if error else ""
        lines.append(f"{label(results, run['variant'])}, seed {run['seed']}: {run['status']}{reason}")
    return lines


def notices(results: Results) -> list[str]:
    """What a reader should know before trusting a comparison: different commits, different numbers of seeds."""
    lines = []
    finished = [run for run in results.get("runs") or () if run["status"] == "finished"]
    commits = sorted({str(run["commit"]) for run in finished if run.get("commit")})
    if len(commits) > 1:
        lines.append(f"The runs come from {len(commits)} different commits: {', '.join(commits)}.")
    seeds = {name: sum(run["variant"] == name for run in finished) for name in results["variants"]}
    most = max(seeds.values(), default=0)
    if fewer := [f"{label(results, name)} {count}" for name, count in seeds.items() if count < most]:
        lines.append(f"Not every variant has {counted(most, 'finished seed')}: {', '.join(fewer)}.")
    return lines


def methods(results: Results) -> list[str]:
    """How the numbers came about: what was held equal, on what, and the statistics."""
    seeds = sorted({run["seed"] for run in results.get("runs") or ()})
    lines = [f"Every run got {_equal(results)}; what else it spent is in the budgets."]
    if seeds:
        lines.append(f"Seeds: {', '.join(map(str, seeds))}, the same for every variant.")
    lines += [
        f"{split_name(split).capitalize()}: {counted(one['num_prompts'], 'prompt')}, {one['samples_per_prompt']} "
        "samples of each, with the same prompts and sampling seeds for every variant."
        for split, one in (results.get("splits") or {}).items()
    ]
    return [*lines, *(results.get("statistics") or ())]


def counted(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _setting(results: Results, split: str) -> str:
    """How much was run and measured."""
    content = results["splits"][split]
    seeds = sorted({len(policy["seeds"]) for policy in evaluated(results, split).values()})
    few = "" if seeds[0] == seeds[-1] else f"{seeds[0]} to "
    return (
        f"Compared are {counted(len(results['variants']), 'variant')} with {few}{counted(seeds[-1], 'finished seed')} "
        f"each, {_equal(results)} a run, on {content['num_prompts']} {split_name(split)} with "
        f"{content['samples_per_prompt']} samples a prompt; {interval_name(results)} intervals in brackets."
    )


def _equal(results: Results) -> str:
    """`40 optimizer steps`."""
    equal = results["equal"]
    return f"{equal['amount']:,} {BUDGETS.get(equal['what'], equal['what'])}"


def _leader(results: Results, split: str) -> str:
    """Who has the highest best-of-n at the headline n, and by how much against the reference; where the reference
    leads, who is second."""
    n, where, reference = results["headline_n"], split_name(split), results["reference"]
    values, differences = at_n(results, split, "best_of_n"), at_n(results, split, "against_reference")
    if not values:
        return f"There is no best-of-{n} on the {where}."
    first, *others = sorted(values, key=lambda name: -values[name]["mean"])
    text = (
        f"At n = {n} on the {where}, {label(results, first)} has the highest best-of-n, {_with_interval(values[first])}"
    )
    if first != reference:
        return f"{text}{_gap(differences.get(first), ': {} over ' + label(results, reference))}."
    if not others:
        return f"{text}."
    return f"{text}; second is {label(results, others[0])}{_gap(differences.get(others[0]), ', {} against it')}."


def _gap(difference: Estimate | None, text: str) -> str:
    """`text` around the difference, with its corrected p-value; empty without a difference."""
    if difference is None:
        return ""
    p_value = difference.get("p_adjusted")
    p_text = "" if p_value is None else f"p {'< 0.001' if p_value < 0.001 else '= ' + rounded(p_value)}"
    return text.format(_signed(difference)) + (f" ({p_text} after correction)" if p_text else "")


def _corrected(results: Results, split: str) -> list[str]:
    """Which differences to the reference survive the correction, or that none does."""
    n, reference = results["headline_n"], label(results, results["reference"])
    differences = at_n(results, split, "against_reference")
    tested = {name: one for name, one in differences.items() if one.get("p_adjusted") is not None}
    if not tested:
        is_missing = results["reference"] not in results["variants"]
        text = f"Nothing is compared with {reference}, the reference: it has no finished run to compare with."
        return [text] if is_missing else []
    comparisons = counted(len(tested), "comparison")
    significant = {name: one["mean"] > 0 for name, one in tested.items() if is_significant(results, one)}
    if not significant:
        return [
            f"No difference to {reference} at n = {n} survives the correction for {comparisons}: these runs do not "
            "tell the variants apart from it."
        ]
    better = [label(results, name) for name, is_better in significant.items() if is_better]
    worse = [label(results, name) for name, is_better in significant.items() if not is_better]
    rest = len(tested) - len(significant)
    parts = [f"better than {reference}: {_listed(better)}", f"worse: {_listed(worse)}"]
    parts += [f"not told apart from it: {rest}"] if rest else []
    return [f"After the correction for {comparisons} at n = {n}, {'; '.join(parts)}."]


def _mean_leader(results: Results, split: str) -> list[str]:
    """Who leads at n = 1, which need not be who leads at the headline n."""
    means, values = at_n(results, split, "best_of_n", 1), at_n(results, split, "best_of_n")
    if not means or not values or results["headline_n"] == 1:
        return []
    name = _highest(means)
    too = "too" if name == _highest(values) else "instead"
    return [f"{label(results, name)} leads at n = 1, the mean reward, {too}: {_with_interval(means[name])}."]


def _against_start(results: Results, split: str) -> list[str]:
    """How many variants are above and below the policy before training, by intervals that exclude 0."""
    differences = at_n(results, split, "against_start")
    if not differences:
        return []
    above = sum((one["low"] or 0) > 0 for one in differences.values())
    below = [f"{label(results, name)} ({_signed(one)})" for name, one in differences.items() if (one["high"] or 0) < 0]
    text = (
        f"Training raised best-of-{results['headline_n']} above the starting policy's in {above} of "
        f"{counted(len(differences), 'variant')} (intervals that exclude 0)"
    )
    return [f"{text}; it lowered it in {_listed(below)}." if below else f"{text} and lowered it in none."]


def _gold_leader(results: Results, split: str) -> list[str]:
    """Who leads by the reward that nobody was trained on, and for whom it fell below the start."""
    n, golds = results["headline_n"], at_n(results, split, "gold_best_of_n")
    if not golds:
        return []
    name = _highest(golds)
    text = f"By the gold reward, the highest at n = {n} is {label(results, name)}, {_with_interval(golds[name])}"
    start = at((evaluated(results, split, start=True).get(START) or {}).get("gold_best_of_n"), n)
    if start is None:
        return [f"{text}."]
    fell = [label(results, name) for name, gold in golds.items() if gold["mean"] < start["mean"]]
    if not fell:
        return [f"{text}; none is below the mean before training, {_with_interval(start)}."]
    return [f"{text}; below the mean before training, {_with_interval(start)}: {_listed(fell)}."]


def _equal_kl_leader(results: Results) -> list[str]:
    """Who leads at the largest KL that at least two variants reached."""
    equal, n = equal_kl_of(results), results["headline_n"]
    for kl in reversed(equal["kls"]):
        curves = {
            name: next((point["best_of_n"] for point in points or () if point and point["kl"] == kl), None)
            for name, points in equal["variants"].items()
        }
        reached = {name: value for name, curve in curves.items() if (value := at(curve, n)) is not None}
        if len(reached) > 1:
            name = _highest(reached)
            return [
                f"At an equal KL of {kl:.3g} {equal.get('unit', 'nats')}, which {counted(len(reached), 'variant')} "
                f"reached, {label(results, name)} has the highest best-of-{n}: {_with_interval(reached[name])}."
            ]
    return []


def _highest(values: Mapping[str, Estimate]) -> str:
    return max(values, key=lambda name: values[name]["mean"])


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    """`1.234 [1.100, 1.300]`."""
    mean, low, high = estimate["mean"], estimate.get("low"), estimate.get("high")
    interval = "" if low is None or high is None else f" [{rounded(low)}, {rounded(high)}]"
    return f"{sign}{rounded(mean)}{interval}"


def _signed(estimate: Estimate) -> str:
    """`+0.123 [0.050, 0.190]`."""
    return _with_interval(estimate, "+" if estimate["mean"] > 0 else "")


def _listed(names: Sequence[Any], most: int = 6) -> str:
    """`a, b`; `none`; of many the first ones and how many more."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
