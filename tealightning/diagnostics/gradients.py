"""Gradient fidelity in analytic worlds: run the measurements and write the report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tealightning.diagnostics.decision import SETTINGS, decisions
from tealightning.diagnostics.fidelity import MIN_GROUPS
from tealightning.diagnostics.fidelity_plots import FIT_FROM, PLOTS, describe, slopes
from tealightning.diagnostics.fidelity_tables import LEGEND, decision_table, measured, world_table
from tealightning.diagnostics.measurements import SWEEPS, Cell, EstimatorSpec, main_cells, measure, sweep_cells
from tealightning.diagnostics.worlds import NAMES, build_world
from tealightning.errors import UserError
from tealightning.reporting.provenance import provenance, provenance_lines
from tealightning.reporting.tables import markdown_table, write_csv

Row = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class GradientSettings:
    """What to measure.

    Raises:
        ValueError: for a value out of range, naming the option.
    """

    estimators: list[EstimatorSpec]
    worlds: Sequence[str] = NAMES
    ms: Sequence[int] = (16, 32)
    target_ns: Sequence[int] = (128,)
    alphas: Sequence[float] = (0.25,)
    sweeps: Sequence[str] = ()
    groups: int = 20_000
    seed: int = 0
    out: Path = Path("runs/diagnose_gradients")
    args: Sequence[str] = field(default_factory=lambda: ["diagnose", "gradients"])  # the command line, for the report

    def __post_init__(self) -> None:
        for option, values, low in (("-m", self.ms, 2), ("-N", self.target_ns, 1)):
            for value in values:
                if value < low:
                    raise UserError(f"{option} must be {low} or more, got {value}.")
        for alpha in self.alphas:
            if not 0 < alpha <= 1:
                raise UserError(f"--alpha must be in (0, 1], the upper share that counts as the tail; got {alpha}.")
        if self.groups < MIN_GROUPS:
            raise UserError(f"--groups must be {MIN_GROUPS} or more (two steps over 256 prompts), got {self.groups}.")


def cells_of(settings: GradientSettings) -> list[Cell]:
    """The main table, then the sweeps at the first m, N and alpha."""
    cells = main_cells(list(dict.fromkeys(settings.worlds)), settings.ms, settings.target_ns, settings.alphas)
    for sweep in SWEEPS:
        if sweep in settings.sweeps:
            cells += sweep_cells(sweep, m=settings.ms[0], target_n=settings.target_ns[0], alpha=settings.alphas[0])
    return cells


def diagnose(settings: GradientSettings, *, progress: bool = False) -> tuple[list[Row], list[Path]]:
    """Measure, and write `fidelity.md`, `fidelity.csv` and the plots of the sweeps into `settings.out`.

    Returns:
        The rows, and the files written.
    """
    rows = measure(
        cells_of(settings), settings.estimators, groups=settings.groups, seed=settings.seed, progress=progress
    )
    source = provenance(settings.args, seed=settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    table, report = settings.out / "fidelity.csv", settings.out / "fidelity.md"
    write_csv(table, [row | {key: source[key] for key in ("command", "commit", "seed")} for row in rows])
    report.write_text(report_text(rows, source, settings.groups), encoding="utf-8")
    plots = []
    for sweep, found in by_sweep(rows).items():
        for file, draw in PLOTS.get(sweep, ()):
            draw(found, settings.out / file)
            plots.append(settings.out / file)
    return rows, [report, table, *plots]


def by_sweep(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the sweep that they belong to ("main" for the tables)."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row["sweep"], []).append(row)
    return result


def report_text(rows: Sequence[Row], source: dict[str, str], groups: int) -> str:
    """`fidelity.md`."""
    parts = ["# Gradient fidelity", provenance_lines(source | {"groups": f"{groups:,} for each figure"}), LEGEND]
    found = by_sweep(rows)
    for world in dict.fromkeys(row["world"] for row in found["main"]):
        parts += [f"## {world}", table_of_world(rows, world)]
    for sweep in SWEEPS:
        if sweep in found:
            parts += [f"## {_TITLES[sweep]}", *_sweep_text(sweep, found[sweep])]
    return "\n\n".join(parts) + "\n"


_TITLES = {"m": "Over the group size", "alpha": "Over alpha", "tail": "Over the tail index"}


def table_of_world(rows: Sequence[Row], world: str) -> str:
    """The exact gradient in a world and the table of its estimators."""
    chosen = [row for row in rows if row["sweep"] == "main" and row["world"] == world]
    directions = build_world(world).directions
    exact = []
    for target_n in dict.fromkeys(row["target_n"] for row in chosen):
        gradient = build_world(world).exact_gradient(target_n).tolist()
        parts = [f"{value:.4g} ({direction})" for value, direction in zip(gradient, directions, strict=True)]
        exact.append(f"Exact gradient at N = {target_n}: {', '.join(parts)}.")
    return "\n\n".join([*exact, world_table(chosen, directions)])


def _sweep_text(sweep: str, rows: Sequence[Row]) -> list[str]:
    images = [f"![{file}]({file})" for file, _ in PLOTS[sweep]]
    fixed = {key: rows[0][key] for key in ("m", "target_n", "alpha") if len({row[key] for row in rows}) == 1}
    at = ", ".join(f"{'N' if key == 'target_n' else key} = {value:g}" for key, value in fixed.items())
    skipped = dict.fromkeys(f"`{r['estimator']}` at m = {r['m']}: {r['note']}" for r in rows if "cosine" not in r)
    notes = [f"Left out: {'; '.join(skipped)}"] if skipped else []
    if sweep == "m":
        notes.insert(0, markdown_table(slope_rows(rows)))
        notes.insert(0, SLOPE_LEGEND)
    return [f"At {at}.", *notes, *images]


SLOPE_LEGEND = f"""\
The slope of log |bias| in log m from m = {FIT_FROM} on, by weighted least squares, for the estimators in units of the
reward. The bias is by control variates. The 95% interval is widened by the points' misfit: where the bias follows no
single power, the slope is a mean over the range. Biases below two standard errors take no part."""


def slope_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Bias at every m, and the fitted slope."""
    result = []
    for label, fit in slopes(rows).items():
        found = {row["m"]: row for row in rows if row["estimator"] == label}
        line = {"estimator": f"`{label}`", "slope [95%]": describe(fit).removeprefix("slope ")}
        result.append(line | {f"bias, m={m}": measured(found[m], "controlled_bias") for m in sorted(found)})
    return result


def diagnose_decision(
    settings: GradientSettings,
    *,
    pairs: Sequence[tuple[int, int]] = SETTINGS,
    seeds: int = 5,
    progress: bool = False,
) -> tuple[list[Row], list[Path]]:
    """Train in the two-arm world and write `decision.md` and `decision.csv` into `settings.out`.

    Raises:
        ValueError: for fewer than 1 seed.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {seeds}.")
    first = settings.seed * seeds
    rows = decisions(
        settings.estimators,
        settings=pairs,
        alpha=settings.alphas[0],
        seeds=range(first, first + seeds),
        progress=progress,
    )
    source = provenance(settings.args, seed=settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    table, report = settings.out / "decision.csv", settings.out / "decision.md"
    write_csv(table, [row | {key: source[key] for key in ("command", "commit", "seed")} for row in rows])
    text = ["# A decision", provenance_lines(source), DECISION_LEGEND.format(seeds=seeds), decision_table(rows)]
    report.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return rows, [report, table]


DECISION_LEGEND = """\
Final probability of arm B, mean and [lowest, highest] over {seeds} seeds. `A ~ N(0, 1)`, `B ~ N(-1.406, 1.6^2)`: A has
the larger mean and the larger best of 16, B the larger best of 128 and beyond, so 1 is right in every column. Softmax
policy over the arms from equal probabilities, 64 prompts a step, 300 Adam steps at 0.03, advantages over their root
mean square."""
