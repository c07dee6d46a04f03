"""Results of an ablation (`results.json`, docs/ablations-results.md) as flat rows, and its tables made from them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tealightning.reporting.tables import Table, TableCell, csv_text, latex_table

Results = Mapping[str, Any]
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
DIAGNOSTICS_NOTE = (
    "Distinct-1 and -2: share of different tokens and pairs of tokens among all of a prompt's completions; "
    "self-similarity: mean overlap (Jaccard) of the token pairs of two of them; reward spread: standard deviation "
    "within a prompt; truncated and unscorable: fractions of completions."
)
BUDGETS = {
    "optimizer_steps": "optimizer steps",
    "rollouts": "rollouts",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "wall_seconds": "wall seconds",
}
CSV_COLUMNS = ("split", "variant", "quantity", "n", "mean", "low", "high", "se", "p_value", "p_adjusted", "kl")


def split_name(split: str) -> str:
    """`val` -> `validation prompts`; other keys name themselves."""
    return {"val": "validation prompts", "test": "held-out prompts"}.get(split, f"{split} prompts")


class ResultsView:
    """The rows of results.json, which are those of table.csv, and names for people.

    `quantity` is a key of results.json, with a dot where it is a part of another: `against_reference.win_rate`.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.names: list[str] = results["variants"]
        self.splits = list(results.get("splits") or {})
        self.main_split = self.splits[0] if self.splits else None
        self.headline_n: int = results["headline_n"]
        self.reference = self.label(results["reference"])
        self.interval = f"{100 * results['confidence']:g}%"
        self.equal_kls: list[float] = (results.get("equal_kl") or {}).get("kls", [])
        self.rows = list(self._rows())
        self._by_quantity: dict[tuple[str | None, str], dict[str, list[Row]]] = {}
        for row in self.rows:
            of_variant = self._by_quantity.setdefault((row.get("split"), row["quantity"]), {})
            of_variant.setdefault(row["variant"], []).append(row)

    def label(self, variant: str) -> str:
        """How a variant is called in tables and plots."""
        labels = {START: "before training"} | (self.results.get("labels") or {})
        return str(labels.get(variant, variant))

    def policies(self, split: str) -> dict[str, Mapping[str, Any]]:
        """Every policy that was evaluated on a split: before training, then the variants in the order of the spec."""
        content = self.results["splits"][split]
        policies: dict[str, Any] = {START: content.get("start"), **(content.get("variants") or {})}
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
        for split in self.splits:
            for name, policy in self.policies(split).items():
                yield from ({"split": split, "variant": name} | row for row in _policy_rows(policy))
        for name, points in (self.results.get("equal_kl") or {"variants": {}})["variants"].items():
            for point in filter(None, points or ()):
                place = {"split": self.main_split, "variant": name, "kl": point["kl"]}
                for quantity in ("best_of_n", "against_reference"):
                    yield from (place | _row(f"equal_kl.{quantity}", one) for one in point.get(quantity) or ())
        for name, spent in (self.results.get("budgets") or {}).items():
            yield from ({"variant": name, "quantity": f"budgets.{key}", "mean": spent.get(key)} for key in BUDGETS)


def _policy_rows(policy: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one policy on one split."""
    for quantity in ("best_of_n", "gold_best_of_n", "against_reference", "against_start"):
        for one in policy.get(quantity) or ():
            yield _row(quantity, one)
            parts = [part for part in ("probability_of_improvement", "win_rate") if one.get(part)]
            yield from ({"n": one["n"]} | _row(f"{quantity}.{part}", one[part]) for part in parts)
    diagnostics = policy.get("diagnostics") or {}
    yield from (_row(f"diagnostics.{key}", diagnostics[key]) for key in DIAGNOSTICS if diagnostics.get(key))


def _row(quantity: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantity": quantity} | {key: estimate[key] for key in CSV_COLUMNS if key in estimate}


def to_csv(results: Results) -> str:
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


def all_tables(results: Results) -> list[Table]:
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
    view: ResultsView, names: Iterable[str], columns: Mapping[str, Mapping[str, TableCell]], **texts: str
) -> Table:
    """A row for each of `names`; a cell that a column has not is not known."""
    unknown = TableCell(kind="number")
    rows = [
        [TableCell(text=view.label(name)), *(column.get(name, unknown) for column in columns.values())]
        for name in names
    ]
    return Table(columns=["variant", *columns], rows=rows, **texts)


def _split_tables(view: ResultsView, split: str) -> list[Table]:
    n, means = view.headline_n, "Mean over prompts and seeds with its {} interval; the highest of each column is bold."
    means = means.format(view.interval)
    star = f"A star at n = {n}: differs from {view.reference} after the correction for multiple comparisons."
    gold = "The gold reward of the sample that the training reward picks among n."
    paired = f"Paired differences of best-of-n with {view.interval} intervals. A star at n = {n}: {_star_note(view)}"

    def over_n(quantity: str, title: str, note: str, starred_by: str = "", *, is_mean: bool = False) -> Table:
        """A column for each n, with a star where the difference `starred_by` is significant."""
        columns = {}
        for n in view.results["ns"]:
            stars = view.significant(view.at(split, starred_by, n))
            heading = "mean reward (n = 1)" if n == 1 and is_mean else f"n = {n}"
            columns[heading] = _numbers(view.at(split, quantity, n), stars, mark_best=is_mean)
        key, title = f"{quantity}_{split}", f"{title}, {split_name(split)}"
        return _table(view, view.curves(split, quantity), columns, key=key, title=title, note=note)

    others = {"against_reference": view.reference, "against_start": "the policy before training"}
    return [
        over_n("best_of_n", "Best-of-n", f"{means} {star}", "against_reference", is_mean=True),
        _reference_table(view, split),
        *(over_n(key, f"Differences to {other} at every n", paired, key) for key, other in others.items()),
        over_n("gold_best_of_n", "Gold reward of the best of n", f"{gold} {means}", is_mean=True),
        _diagnostics_table(view, split),
    ]


def _star_note(view: ResultsView) -> str:
    return f"the corrected p-value is below {1 - view.results['confidence']:.2g}."


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
    return _table(
        view,
        rows,
        columns,
        key=f"reference_{split}",
        title=f"Differences to {reference} at n = {n}, {split_name(split)}",
        note=f"Paired differences of best-of-{n} with {view.interval} intervals. Probability of improvement: the share "
        f"of (seed, prompt) pairs on which best-of-{n} is higher than {reference}'s. Win rate: how often the variant's "
        f"best of {n} beats {reference}'s, ties split. A star: {_star_note(view)}",
    )


def _diagnostics_table(view: ResultsView, split: str) -> Table:
    """KL, length, diversity and spread of every policy; columns that nobody has are left out."""
    columns = {title: _numbers(view.at(split, f"diagnostics.{key}")) for key, title in DIAGNOSTICS.items()}
    known = {title: column for title, column in columns.items() if column}
    return _table(
        view,
        view.policies(split) if known else (),
        known,
        key=f"diagnostics_{split}",
        title=f"Completions, {split_name(split)}",
        note=f"Means with {view.interval} intervals. {DIAGNOSTICS_NOTE}",
    )


def _equal_kl_tables(view: ResultsView) -> list[Table]:
    """Best-of-n where every variant has moved equally far from the start, and differences to the reference there."""
    if not view.equal_kls or view.main_split is None:
        return []
    split, n, unit = view.main_split, view.headline_n, view.results["equal_kl"].get("unit", "nats")
    against = "equal_kl.against_reference"
    values = {
        f"KL {kl:g}, n = {each}": _numbers(view.at(split, "equal_kl.best_of_n", each, kl), mark_best=True)
        for kl in view.equal_kls
        for each in dict.fromkeys([1, n])
    }
    return [
        _table(
            view,
            view.names,
            values,
            key="equal_kl",
            title=f"Best-of-n at equal KL, {split_name(split)}",
            note="Interpolated linearly in the square root of the KL between evaluations; KL to the start in "
            f"{unit}. A dash: the variant never moved that far. The highest of each column is bold.",
        ),
        _table(
            view,
            view.curves(split, against),
            {f"KL {kl:g}": _numbers(view.at(split, against, n, kl)) for kl in view.equal_kls},
            key="equal_kl_differences",
            title=f"Differences to {view.reference} at equal KL, n = {n}, {split_name(split)}",
            note=f"Paired differences of best-of-{n} with {view.interval} intervals, not corrected for the number of "
            f"comparisons; KL in {unit}. A dash: one of the two never moved that far.",
        ),
    ]


def _budget_table(view: ResultsView) -> Table:
    """What every variant spent, means over its finished seeds."""
    spent = view.results.get("budgets") or {}
    return Table(
        key="budgets",
        title="Budgets",
        note=f"Means over finished seeds, of training alone. Held equal: {BUDGETS.get(view.results['equal']['what'])}.",
        columns=["variant", *BUDGETS.values()],
        rows=[[TableCell(text=view.label(name)), *_counts(spent[name])] for name in view.names if name in spent],
    )


def _run_table(view: ResultsView) -> Table:
    """Every planned run, failed ones first, then missing ones, then the finished."""
    order, texts = {"failed": 0, "missing": 1}, ("seed", "status", "error", "commit", "folder")
    rows = []
    for run in sorted(view.results.get("runs") or (), key=lambda run: order.get(run["status"], 2)):
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
