"""Results of an ablation (`results.json`, docs/ablations-results.md) as flat rows, and its tables made from them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tealightning.reporting.tables import Table, TableCell, csv_text, latex_table

Row = dict[str, Any]  # one estimate, of CSV_COLUMNS those that it has; what is not known is None

START = "(start)"  # the policy before training, where a variant's name would stand; no variant can be called so
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


def split_name(split: str) -> str:
    """`val` -> `validation prompts`."""
    return {"val": "validation prompts", "test": "held-out prompts"}[split]


class ResultsView:
    """The rows of results.json, which are those of table.csv, and names for people.

    `quantity` is a key of results.json, with a dot where it is a part of another: `against_reference.win_rate`.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.names: list[str] = results["variants"]
        self.splits = list(results["splits"])
        self.main_split = self.splits[0]
        self.headline_n: int = results["headline_n"]
        self.reference = self.label(results["reference"])
        self.interval = f"{100 * results['confidence']:g}%"
        self.star_note = f"the corrected p-value is below {1 - results['confidence']:.2g}."
        self.equal_kls: list[float] = (results["equal_kl"] or {"kls": []})["kls"]
        self.rows = list(self._rows())
        self._by_quantity: defaultdict[Any, dict[str, list[Row]]] = defaultdict(dict)
        for row in self.rows:
            self._by_quantity[row["split"], row["quantity"]].setdefault(row["variant"], []).append(row)

    def label(self, variant: str) -> str:
        """How a variant is called in tables and plots."""
        return str({START: "before training", **(self.results["labels"] or {})}.get(variant, variant))

    def policies(self, split: str) -> dict[str, dict[str, Any]]:
        """Every policy that was evaluated on a split: before training, then the variants in the order of the spec."""
        content = self.results["splits"][split]
        policies = {START: content["start"], **content["variants"]}
        return {name: policies[name] for name in (START, *self.names) if policies.get(name)}

    def curves(self, split: str | None, quantity: str) -> dict[str, list[Row]]:
        """All rows of a quantity, for each policy that has it."""
        return self._by_quantity.get((split, quantity), {})

    def at(self, split: str | None, quantity: str, n: int | None = None, kl: float | None = None) -> dict[str, Row]:
        """The row at n and KL (None = without one), for each policy of which the mean is known there."""
        return {
            name: row
            for name, rows in self.curves(split, quantity).items()
            for row in rows
            if row.get("n") == n and row.get("kl") == kl and row["mean"] is not None
        }

    def significant(self, rows: Mapping[str, Row]) -> set[str]:
        """The variants whose corrected p-value is below 1 - confidence."""
        p_values = {name: row.get("p_adjusted") for name, row in rows.items()}
        return {name for name, p in p_values.items() if p is not None and p < 1 - self.results["confidence"]}

    def _rows(self) -> Iterator[Row]:
        def row(split: str | None, variant: str, quantity: str, estimate: Row, **place: float) -> Row:
            numbers = {key: estimate[key] for key in CSV_COLUMNS if key in estimate}
            return {"split": split, "variant": variant, "quantity": quantity, **place, **numbers}

        for split in self.splits:
            for name, policy in self.policies(split).items():
                for quantity in ("best_of_n", "gold_best_of_n", "against_reference", "against_start"):
                    for one in policy.get(quantity) or ():
                        yield row(split, name, quantity, one)
                        for part in ("probability_of_improvement", "win_rate"):
                            if part in one:
                                yield row(split, name, f"{quantity}.{part}", one[part], n=one["n"])
                for key in DIAGNOSTICS:
                    if estimate := policy["diagnostics"].get(key):
                        yield row(split, name, f"diagnostics.{key}", estimate)
        for name, points in (self.results["equal_kl"] or {"variants": {}})["variants"].items():
            for point in filter(None, points):
                for quantity in ("best_of_n", "against_reference"):
                    for one in point[quantity] or ():
                        yield row(self.main_split, name, f"equal_kl.{quantity}", one, kl=point["kl"])
        for name, spent in self.results["budgets"].items():
            yield from (row(None, name, f"budgets.{key}", {"mean": spent[key]}) for key in BUDGETS)


def to_csv(results: dict[str, Any]) -> str:
    """Every estimate of the tables, with every digit: reading a number back gives that of results.json."""
    return csv_text(ResultsView(results).rows, CSV_COLUMNS)


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


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table of an ablation: those of each split, then equal KL, budgets and runs. Empty ones are left out."""
    view = ResultsView(results)
    tables = [table for split in view.splits for table in _split_tables(view, split)]
    tables += [*_equal_kl_tables(view), _budget_table(view), _run_table(view)]
    return [table for table in tables if table.rows]


def _numbers(rows: Mapping[str, Row], stars: Iterable[str] = (), *, mark_best: bool = False) -> dict[str, TableCell]:
    """The cells of a column: numbers with intervals, stars at those of `stars`; of equal highest ones all are best."""
    highest = max((row["mean"] for row in rows.values()), default=None) if mark_best else None
    cells = {}
    for name, row in rows.items():
        marks = {"best": row["mean"] == highest, "star": name in stars}
        cells[name] = TableCell(kind="number", value=row["mean"], low=row.get("low"), high=row.get("high"), **marks)
    return cells


def _table(
    view: ResultsView,
    names: Iterable[str],
    columns: Mapping[str, Mapping[str, TableCell]],
    title: str,
    note: str,
    key: str,
) -> Table:
    """A row for each of `names`; a cell that a column has not is not known."""
    unknown = TableCell(kind="number")
    rows = [
        [TableCell(text=view.label(name)), *(column.get(name, unknown) for column in columns.values())]
        for name in names
    ]
    return Table(columns=["variant", *columns], rows=rows, title=title, note=note, key=key)


def _split_tables(view: ResultsView, split: str) -> list[Table]:
    n = view.headline_n
    means = f"Mean over prompts and seeds with its {view.interval} interval; the highest of each column is bold."
    star = f"A star at n = {n}: differs from {view.reference} after the correction for multiple comparisons."
    gold = "The gold reward of the sample that the training reward picks among n."
    paired = f"Paired differences of best-of-n with {view.interval} intervals. A star at n = {n}: {view.star_note}"

    def over_n(quantity: str, title: str, note: str, starred_by: str = "", *, is_mean: bool = False) -> Table:
        """A column for each n, with a star where the difference `starred_by` is significant."""
        columns = {}
        for n in view.results["ns"]:
            stars = view.significant(view.at(split, starred_by, n))
            heading = "mean reward (n = 1)" if n == 1 and is_mean else f"n = {n}"
            columns[heading] = _numbers(view.at(split, quantity, n), stars, mark_best=is_mean)
        title = f"{title}, {split_name(split)}"
        return _table(view, view.curves(split, quantity), columns, title, note, f"{quantity}_{split}")

    others = {"against_reference": view.reference, "against_start": "the policy before training"}
    return [
        over_n("best_of_n", "Best-of-n", f"{means} {star}", "against_reference", is_mean=True),
        _reference_table(view, split),
        *(over_n(key, f"Differences to {other} at every n", paired, key) for key, other in others.items()),
        over_n("gold_best_of_n", "Gold reward of the best of n", f"{gold} {means}", is_mean=True),
        _diagnostics_table(view, split),
    ]


def _reference_table(view: ResultsView, split: str) -> Table:
    """Differences to the reference at the headline n: reward, probability of improvement, win rate and p-values."""
    n, reference, against = view.headline_n, view.reference, "against_reference"
    rows = view.at(split, against, n)
    columns = {
        "difference": _numbers(rows, view.significant(rows)),
        "probability of improvement": _numbers(view.at(split, f"{against}.probability_of_improvement", n)),
        "win rate": _numbers(view.at(split, f"{against}.win_rate", n)),
    }
    for key, heading in {"p_value": "p", "p_adjusted": "p, Holm"}.items():
        columns[heading] = {name: TableCell(kind="p_value", value=row.get(key)) for name, row in rows.items()}
    title = f"Differences to {reference} at n = {n}, {split_name(split)}"
    note = f"Paired differences of best-of-{n} with {view.interval} intervals. A star: {view.star_note}"
    return _table(view, rows, columns, title, note, f"reference_{split}")


def _diagnostics_table(view: ResultsView, split: str) -> Table:
    """KL, length, diversity and spread of every policy; columns that nobody has are left out."""
    columns = {title: _numbers(view.at(split, f"diagnostics.{key}")) for key, title in DIAGNOSTICS.items()}
    known = {title: column for title, column in columns.items() if column}
    note = (
        f"Means with {view.interval} intervals. Distinct-1 and -2: share of different tokens and pairs of tokens among "
        "all of a prompt's completions; self-similarity: mean overlap (Jaccard) of the token pairs of two of them; "
        "reward spread: standard deviation within a prompt; truncated and unscorable: fractions of completions."
    )
    title, names = f"Completions, {split_name(split)}", view.policies(split) if known else ()
    return _table(view, names, known, title, note, f"diagnostics_{split}")


def _equal_kl_tables(view: ResultsView) -> list[Table]:
    """Best-of-n where every variant has moved equally far from the start, and differences to the reference there."""
    split, n, kls = view.main_split, view.headline_n, view.equal_kls
    if not kls:
        return []
    values, differences = "equal_kl.best_of_n", "equal_kl.against_reference"
    columns = {
        f"KL {kl:g}, n = {each}": _numbers(view.at(split, values, each, kl), mark_best=True)
        for kl in kls
        for each in dict.fromkeys([1, n])
    }
    at_kls = {f"KL {kl:g}": _numbers(view.at(split, differences, n, kl)) for kl in kls}
    unit, where = view.results["equal_kl"]["unit"], split_name(split)
    note = (
        f"Interpolated linearly in the square root of the KL between evaluations; KL to the start in {unit}. A dash: "
        "the variant never moved that far. The highest of each column is bold."
    )
    paired = (
        f"Paired differences of best-of-{n} with {view.interval} intervals, not corrected for the number of "
        f"comparisons; KL in {unit}. A dash: one of the two never moved that far."
    )
    title = f"Differences to {view.reference} at equal KL, n = {n}, {where}"
    return [
        _table(view, view.names, columns, f"Best-of-n at equal KL, {where}", note, "equal_kl"),
        _table(view, view.curves(split, differences), at_kls, title, paired, "equal_kl_differences"),
    ]


def _budget_table(view: ResultsView) -> Table:
    """What every variant spent, means over its finished seeds."""
    spent = view.results["budgets"]
    return Table(
        key="budgets",
        title="Budgets",
        note=f"Means over finished seeds, of training alone. Held equal: {BUDGETS[view.results['equal']['what']]}.",
        columns=["variant", *BUDGETS.values()],
        rows=[[TableCell(text=view.label(name)), *_counts(spent[name])] for name in view.names if name in spent],
    )


def _run_table(view: ResultsView) -> Table:
    """Every planned run, failed ones first, then missing ones, then the finished."""
    order, texts = {"failed": 0, "missing": 1}, ("seed", "status", "error", "commit", "folder")
    rows = []
    for run in sorted(view.results["runs"], key=lambda run: order.get(run["status"], 2)):
        shown = [view.label(run["variant"]), *("" if run.get(key) is None else str(run[key]) for key in texts)]
        rows.append([*(TableCell(text=text) for text in shown), *_counts(run)])
    return Table(
        key="runs",
        title="Runs",
        note="Every planned run, those that failed or are missing first.",
        columns=["variant", *texts, *BUDGETS.values()],
        rows=rows,
    )


def _counts(spent: Mapping[str, Any]) -> list[TableCell]:
    return [TableCell(kind="count", value=spent.get(key)) for key in BUDGETS]
