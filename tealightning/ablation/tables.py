"""Build the tables of an ablation from its results; variants stand in the order of the spec."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tealightning.ablation.results_view import (
    BUDGETS,
    DIAGNOSTICS,
    Estimate,
    Results,
    at,
    equal_kl_of,
    evaluated,
    interval_name,
    is_significant,
    label,
    main_split,
    split_name,
)
from tealightning.reporting.tables import Table, TableCell, latex_table

DIAGNOSTICS_NOTE = (
    "Distinct-1 and -2: share of different tokens and pairs of tokens among all of a prompt's completions; "
    "self-similarity: mean overlap (Jaccard) of the token pairs of two of them; reward spread: standard deviation "
    "within a prompt; truncated and unscorable: fractions of completions."
)


def all_tables(results: Results) -> list[Table]:
    """Every table of an ablation: those of each split, then equal KL, budgets and runs. Empty ones are left out."""
    tables = [table for split in results.get("splits") or {} for table in _split_tables(results, split)]
    tables += [_equal_kl_table(results), _equal_kl_differences(results), _budget_table(results), _run_table(results)]
    return [table for table in tables if table.rows]


def to_latex(tables: Sequence[Table]) -> str:
    """All tables; of the runs only those that did not finish."""
    parts = ["% Needs \\usepackage{booktabs}.\n"]
    for table in tables:
        if table.key == "runs":
            status, end = table.columns.index("status"), table.columns.index("error") + 1
            rows = [row[:end] for row in table.rows if row[status].text != "finished"]
            columns = table.columns[:end]
            table = replace(table, title="Runs that did not finish", note="", columns=columns, rows=rows)
        parts += [latex_table(table)] if table.rows else []
    return "\n".join(parts)


def _split_tables(results: Results, split: str) -> list[Table]:
    return [
        _main_table(results, split, "best_of_n"),
        _reference_table(results, split),
        _difference_table(results, split, "against_reference"),
        _difference_table(results, split, "against_start"),
        _main_table(results, split, "gold_best_of_n"),
        _diagnostics_table(results, split),
    ]


def _main_table(results: Results, split: str, quantity: str) -> Table:
    """Best-of-n at every n, or its gold reward."""
    ns, headline, is_gold = results["ns"], results["headline_n"], quantity == "gold_best_of_n"

    def cell(policy: Mapping[str, Any], n: int) -> TableCell:
        star = not is_gold and n == headline and is_significant(results, at(policy.get("against_reference"), n))
        return _cell(at(policy[quantity], n), star=star)

    policies = evaluated(results, split, start=True).items()
    note = (
        f"Mean over prompts and seeds with its {interval_name(results)} interval; the highest of each column is bold."
    )
    star_note = (
        f" A star at n = {headline}: differs from {label(results, results['reference'])} after the correction for "
        "multiple comparisons."
    )
    gold_note = f"The gold reward of the sample that the training reward picks among n. {note}"
    return Table(
        key=f"{quantity}_{split}",
        title=f"{'Gold reward of the best of n' if is_gold else 'Best-of-n'}, {split_name(split)}",
        note=gold_note if is_gold else note + star_note,
        columns=["variant", *("mean reward (n = 1)" if n == 1 else f"n = {n}" for n in ns)],
        rows=_with_best(
            [_name(results, name), *(cell(policy, n) for n in ns)] for name, policy in policies if policy.get(quantity)
        ),
    )


def _reference_table(results: Results, split: str) -> Table:
    """Differences to the reference at the headline n: reward, probability of improvement, win rate and p-values."""
    reference, n, rows = label(results, results["reference"]), results["headline_n"], []
    for name, policy in evaluated(results, split).items():
        if (difference := at(policy.get("against_reference"), n)) is not None:
            cells = [_cell(difference, star=is_significant(results, difference))]
            cells += [_cell(difference.get(key)) for key in ("probability_of_improvement", "win_rate")]
            cells += [TableCell(kind="p_value", value=difference.get(key)) for key in ("p_value", "p_adjusted")]
            rows.append([_name(results, name), *cells])
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


def _difference_table(results: Results, split: str, against: str) -> Table:
    """Differences to the reference or to the start at every n, `against` being the key in results.json."""
    ns, rows = results["ns"], []
    for name, policy in evaluated(results, split).items():
        if curve := policy.get(against):
            cells = [_cell(at(curve, n), star=is_significant(results, at(curve, n))) for n in ns]
            rows.append([_name(results, name), *cells])
    other = label(results, results["reference"]) if against == "against_reference" else "the policy before training"
    return Table(
        key=f"{against}_{split}",
        title=f"Differences to {other} at every n, {split_name(split)}",
        note=f"Paired differences of best-of-n with {interval_name(results)} intervals. A star at n = "
        f"{results['headline_n']}: the corrected p-value is below {1 - results['confidence']:.2g}.",
        columns=["variant", *(f"n = {n}" for n in ns)],
        rows=rows,
    )


def _diagnostics_table(results: Results, split: str) -> Table:
    """KL, length, diversity and spread of every policy; columns that nobody has are left out."""
    diagnostics = {n: p.get("diagnostics") or {} for n, p in evaluated(results, split, start=True).items()}
    known = [key for key in DIAGNOSTICS if any(own.get(key) for own in diagnostics.values())]
    rows = [[_name(results, name), *(_cell(own.get(key)) for key in known)] for name, own in diagnostics.items()]
    return Table(
        key=f"diagnostics_{split}",
        title=f"Completions, {split_name(split)}",
        note=f"Means with {interval_name(results)} intervals. {DIAGNOSTICS_NOTE}",
        columns=["variant", *(DIAGNOSTICS[key] for key in known)],
        rows=rows if known else [],
    )


def _equal_kl_table(results: Results) -> Table:
    """Best-of-n at n = 1 and the headline n where every variant has moved equally far from the start."""
    equal, ns = equal_kl_of(results), list(dict.fromkeys([1, results["headline_n"]]))
    return Table(
        key="equal_kl",
        title="Best-of-n at equal KL" + _of_main_split(results),
        note="Interpolated linearly in the square root of the KL between evaluations; KL to the start in "
        f"{equal.get('unit', 'nats')}. A "
        "dash: the variant never moved that far. The highest of each column is bold.",
        columns=["variant", *(f"KL {kl:g}, n = {n}" for kl in equal["kls"] for n in ns)],
        rows=_with_best(_at_equal_kl(results, "best_of_n", ns)),
    )


def _equal_kl_differences(results: Results) -> Table:
    """Differences to the reference at the headline n where both have moved equally far from the start."""
    equal, n, reference = equal_kl_of(results), results["headline_n"], label(results, results["reference"])
    return Table(
        key="equal_kl_differences",
        title=f"Differences to {reference} at equal KL, n = {n}" + _of_main_split(results),
        note=f"Paired differences of best-of-{n} with {interval_name(results)} intervals, not corrected for the number "
        f"of comparisons; KL in {equal.get('unit', 'nats')}. A dash: one of the two never moved that far.",
        columns=["variant", *(f"KL {kl:g}" for kl in equal["kls"])],
        rows=_at_equal_kl(results, "against_reference", [n], only_known=True),
    )


def _at_equal_kl(
    results: Results, quantity: str, ns: Sequence[int], *, only_known: bool = False
) -> list[list[TableCell]]:
    """A row for each variant, a column for each KL and n; with `only_known`, no variant without `quantity`."""
    equal, rows = equal_kl_of(results), []
    for name in results["variants"]:
        curves = {point["kl"]: point.get(quantity) for point in equal["variants"].get(name) or () if point}
        if equal["kls"] and (any(curves.values()) or not only_known):
            rows.append([_name(results, name), *(_cell(at(curves.get(kl), n)) for kl in equal["kls"] for n in ns)])
    return rows


def _of_main_split(results: Results) -> str:
    split = main_split(results)
    return f", {split_name(split)}" if split else ""


def _budget_table(results: Results) -> Table:
    """What every variant spent, means over its finished seeds."""
    spent = results.get("budgets") or {}
    return Table(
        key="budgets",
        title="Budgets",
        note=f"Means over finished seeds, of training alone. Held equal: {BUDGETS.get(results['equal']['what'])}.",
        columns=["variant", *BUDGETS.values()],
        rows=[[_name(results, name), *_counts(spent[name])] for name in results["variants"] if spent.get(name)],
    )


def _run_table(results: Results) -> Table:
    """Every planned run, failed ones first, then missing ones, then the finished."""
    order, texts = {"failed": 0, "missing": 1}, ("seed", "status", "error", "commit", "folder")
    runs = sorted(results.get("runs") or (), key=lambda run: order.get(run["status"], 2))

    def cells(run: Mapping[str, Any]) -> list[TableCell]:
        values = [run.get(key) for key in texts]
        return [TableCell(text="" if value is None else str(value)) for value in values]

    return Table(
        key="runs",
        title="Runs",
        note="Every planned run, those that failed or are missing first.",
        columns=["variant", *texts, *BUDGETS.values()],
        rows=[[_name(results, run["variant"]), *cells(run), *_counts(run)] for run in runs],
    )


def _name(results: Results, variant: str) -> TableCell:
    return TableCell(text=label(results, variant))


def _counts(spent: Mapping[str, Any]) -> list[TableCell]:
    return [TableCell(kind="count", value=spent.get(key)) for key in BUDGETS]


def _cell(estimate: Estimate | None, *, star: bool = False) -> TableCell:
    """A number with its interval; an empty numeric cell for None."""
    if estimate is None:
        return TableCell(kind="number")
    low, high = estimate.get("low"), estimate.get("high")
    return TableCell(kind="number", value=estimate["mean"], low=low, high=high, star=star)


def _with_best(rows: Iterable[list[TableCell]]) -> list[list[TableCell]]:
    """The highest number of each column marked; of equal ones all."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True))
    highest = [max((cell.value for cell in column if cell.value is not None), default=None) for column in columns]
    return [
        [replace(cell, best=cell.value == top is not None) for cell, top in zip(row, highest, strict=True)]
        for row in rows
    ]
