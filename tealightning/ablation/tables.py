"""Build the tables of an ablation from its results; `table_formats` writes them.

Variants stand in the order of the spec. A cell holds unrounded numbers: what is shown of them is the writer's business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tealightning.ablation.results_view import (
    BUDGETS,
    DIAGNOSTICS,
    START,
    Estimate,
    Results,
    at,
    budgets_of,
    evaluated,
    interval_name,
    is_significant,
    label,
    main_split,
    split_name,
)

DIAGNOSTICS_NOTE = (
    "Distinct-1 and -2: share of different tokens and pairs of tokens among all of a prompt's completions; "
    "self-similarity: mean overlap (Jaccard) of the token pairs of two of them; reward spread: standard deviation "
    "within a prompt; truncated and unscorable: fractions of completions."
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Cell:
    """One cell: text, or a number with an optional interval."""

    kind: Literal["text", "number", "count", "p_value"] = "text"
    text: str = ""
    value: float | None = None  # None in a numeric cell = not known
    low: float | None = None
    high: float | None = None
    best: bool = False  # the highest of its column
    star: bool = False  # differs from the reference after correction


@dataclass(kw_only=True, slots=True, frozen=True)
class Table:
    """A table whose first column says what a row is of.

    `key` is unique among the tables of an ablation; `note` is a sentence or two on how to read it.
    """

    key: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]


def all_tables(results: Results) -> list[Table]:
    """Every table of an ablation: those of each split, then equal KL, budgets and runs. Empty ones are left out."""
    tables = [table for split in results.get("splits") or {} for table in split_tables(results, split)]
    tables += [equal_kl_table(results), equal_kl_difference_table(results), budget_table(results), run_table(results)]
    return [table for table in tables if table.rows]


def split_tables(results: Results, split: str) -> list[Table]:
    """The tables of one prompt set."""
    return [
        main_table(results, split),
        reference_table(results, split),
        difference_table(results, split, "against_reference"),
        difference_table(results, split, "against_start"),
        main_table(results, split, "gold_best_of_n"),
        diagnostics_table(results, split),
    ]


def main_table(results: Results, split: str, quantity: str = "best_of_n") -> Table:
    """Best-of-n at every n, n = 1 being the mean reward; `quantity` may be `gold_best_of_n`."""
    ns = budgets_of(results, split, quantity)
    rows = [
        [name_cell(results, name), *(estimate_cell(at(policy[quantity], n)) for n in ns)]
        for name, policy in evaluated(results, split, start=True).items()
        if policy.get(quantity)
    ]
    note = (
        f"Mean over prompts and seeds with its {interval_name(results)} interval; the highest of each column is bold."
    )
    if quantity == "best_of_n":
        rows = starred(results, split, rows, ns)
        note += (
            f" A star at n = {results['headline_n']}: differs from {label(results, results['reference'])} after the "
            "correction for multiple comparisons."
        )
    else:
        note = f"The gold reward of the sample that the training reward picks among n. {note}"
    what = "Best-of-n" if quantity == "best_of_n" else "Gold reward of the best of n"
    columns = ["variant", *("mean reward (n = 1)" if n == 1 else f"n = {n}" for n in ns)]
    return Table(
        key=f"{quantity}_{split}",
        title=f"{what}, {split_name(split)}",
        note=note,
        columns=columns,
        rows=with_best(rows),
    )


def reference_table(results: Results, split: str) -> Table:
    """Differences to the reference at the headline n: reward, probability of improvement, win rate and p-values."""
    rows = []
    for name, policy in evaluated(results, split).items():
        found = at(policy.get("against_reference"), results["headline_n"])
        if found is not None:
            cell = replace(estimate_cell(found), star=is_significant(results, found))
            shares = [estimate_cell(found.get(key)) for key in ("probability_of_improvement", "win_rate")]
            p_values = [Cell(kind="p_value", value=found.get(key)) for key in ("p_value", "p_adjusted")]
            rows.append([name_cell(results, name), cell, *shares, *p_values])
    reference, n = label(results, results["reference"]), results["headline_n"]
    return Table(
        key=f"reference_{split}",
        title=f"Differences to {reference} at n = {n}, {split_name(split)}",
        note=f"Paired differences of best-of-{n} with {interval_name(results)} intervals. Probability of improvement: "
        f"the share of (seed, prompt) pairs on which best-of-{n} is higher than {reference}'s. Win rate: how often the "
        f"variant's best of {n} beats {reference}'s, ties split. A star: the corrected p-value is below "
        f"{1 - results['confidence']:.2g}.",
        columns=["variant", "difference", "probability of improvement", "win rate", "p", "p, Holm"],
        rows=rows,
    )


def difference_table(results: Results, split: str, against: str) -> Table:
    """Differences to the reference or to the start at every n, `against` being the key in results.json."""
    ns = budgets_of(results, split, against)
    rows = []
    for name, policy in evaluated(results, split).items():
        if found := policy.get(against):
            cells = [replace(estimate_cell(at(found, n)), star=is_significant(results, at(found, n))) for n in ns]
            rows.append([name_cell(results, name), *cells])
    other = label(results, results["reference"]) if against == "against_reference" else "the policy before training"
    return Table(
        key=f"{against}_{split}",
        title=f"Differences to {other} at every n, {split_name(split)}",
        note=f"Paired differences of best-of-n with {interval_name(results)} intervals. A star at n = "
        f"{results['headline_n']}: the corrected p-value is below {1 - results['confidence']:.2g}.",
        columns=["variant", *(f"n = {n}" for n in ns)],
        rows=rows,
    )


def diagnostics_table(results: Results, split: str) -> Table:
    """KL, length, diversity and spread of every policy; columns that nobody has are left out."""
    policies = evaluated(results, split, start=True)
    known = [key for key in DIAGNOSTICS if any((p.get("diagnostics") or {}).get(key) for p in policies.values())]
    rows = [
        [name_cell(results, name), *(estimate_cell((policy.get("diagnostics") or {}).get(key)) for key in known)]
        for name, policy in policies.items()
    ]
    return Table(
        key=f"diagnostics_{split}",
        title=f"Completions, {split_name(split)}",
        note=f"Means with {interval_name(results)} intervals. {DIAGNOSTICS_NOTE}",
        columns=["variant", *(DIAGNOSTICS[key] for key in known)],
        rows=rows if known else [],
    )


def equal_kl_table(results: Results) -> Table:
    """Best-of-n at n = 1 and the headline n where every variant has moved equally far from the start."""
    equal: Mapping[str, Any] = results.get("equal_kl") or {"kls": [], "variants": {}}
    ns = list(dict.fromkeys([1, results["headline_n"]]))
    rows = []
    for name in results["variants"]:
        points = {point["kl"]: point["best_of_n"] for point in equal["variants"].get(name) or () if point}
        cells = [estimate_cell(at(points.get(kl), n)) for kl in equal["kls"] for n in ns]
        if cells:
            rows.append([name_cell(results, name), *cells])
    split = main_split(results)
    return Table(
        key="equal_kl",
        title="Best-of-n at equal KL" + (f", {split_name(split)}" if split else ""),
        note="Interpolated linearly in the square root of the KL between evaluations; KL to the start in "
        f"{equal.get('unit', 'nats')}. A "
        "dash: the variant never moved that far. The highest of each column is bold.",
        columns=["variant", *(f"KL {kl:g}, n = {n}" for kl in equal["kls"] for n in ns)],
        rows=with_best(rows),
    )


def equal_kl_difference_table(results: Results) -> Table:
    """Differences to the reference at the headline n where both have moved equally far from the start."""
    equal: Mapping[str, Any] = results.get("equal_kl") or {"kls": [], "variants": {}}
    n, reference, split = results["headline_n"], label(results, results["reference"]), main_split(results)
    rows = []
    for name in results["variants"]:
        points = {p["kl"]: p.get("against_reference") for p in equal["variants"].get(name) or () if p}
        if any(points.values()):
            rows.append([name_cell(results, name), *(estimate_cell(at(points.get(kl), n)) for kl in equal["kls"])])
    return Table(
        key="equal_kl_differences",
        title=f"Differences to {reference} at equal KL, n = {n}" + (f", {split_name(split)}" if split else ""),
        note=f"Paired differences of best-of-{n} with {interval_name(results)} intervals, not corrected for the number "
        f"of comparisons; KL in {equal.get('unit', 'nats')}. A dash: one of the two never moved that far.",
        columns=["variant", *(f"KL {kl:g}" for kl in equal["kls"])],
        rows=rows,
    )


def budget_table(results: Results) -> Table:
    """What every variant spent, means over its finished seeds."""
    spent = results.get("budgets") or {}
    rows = [
        [name_cell(results, name), *(Cell(kind="count", value=spent[name].get(key)) for key in BUDGETS)]
        for name in results["variants"]
        if spent.get(name)
    ]
    return Table(
        key="budgets",
        title="Budgets",
        note=f"Means over finished seeds, of training alone. Held equal: {BUDGETS.get(results['equal']['what'])}.",
        columns=["variant", *BUDGETS.values()],
        rows=rows,
    )


def run_table(results: Results) -> Table:
    """Every planned run, failed ones first, then missing ones, then the finished."""
    order = {"failed": 0, "missing": 1}
    runs = sorted(results.get("runs") or (), key=lambda run: order.get(run["status"], 2))
    texts = ("status", "error", "commit", "folder")
    rows = [
        [
            name_cell(results, run["variant"]),
            Cell(text=str(run["seed"])),
            *(Cell(text=str(run.get(key) or "")) for key in texts),
            *(Cell(kind="count", value=run.get(key)) for key in BUDGETS),
        ]
        for run in runs
    ]
    return Table(
        key="runs",
        title="Runs",
        note="Every planned run, those that failed or are missing first.",
        columns=["variant", "seed", *texts, *BUDGETS.values()],
        rows=rows,
    )


def name_cell(results: Results, variant: str) -> Cell:
    return Cell(text=label(results, variant))


def estimate_cell(estimate: Estimate | None) -> Cell:
    """A number with its interval; an empty numeric cell for None."""
    if estimate is None:
        return Cell(kind="number")
    return Cell(kind="number", value=estimate["mean"], low=estimate.get("low"), high=estimate.get("high"))


def with_best(rows: list[list[Cell]]) -> list[list[Cell]]:
    """The highest number of each column marked; of equal ones all."""
    if not rows:
        return rows
    highest = [max(numbers(column), default=None) for column in zip(*rows, strict=True)]
    return [
        [
            replace(cell, best=cell.value is not None and cell.value == top)
            for cell, top in zip(row, highest, strict=True)
        ]
        for row in rows
    ]


def numbers(cells: Iterable[Cell]) -> Iterable[float]:
    return (cell.value for cell in cells if cell.value is not None)


def starred(results: Results, split: str, rows: list[list[Cell]], ns: list[int]) -> list[list[Cell]]:
    """A star at the headline n for the rows whose difference to the reference survives the correction."""
    n = results["headline_n"]
    names = [name for name, policy in evaluated(results, split, start=True).items() if policy.get("best_of_n")]
    for name, row in zip(names, rows, strict=True):
        policy = evaluated(results, split).get(name) if name != START else None
        if n in ns and policy and is_significant(results, at(policy.get("against_reference"), n)):
            column = 1 + ns.index(n)
            row[column] = replace(row[column], star=True)
    return rows
