"""Report of a policy's gradient fidelity: table, CSV, plot and page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tealightning.diagnostics.policy_fidelity import FidelityReport, FidelityRow
from tealightning.diagnostics.policy_fidelity_statistics import STEP_PROMPTS, Estimate
from tealightning.reporting.tables import markdown_table, write_csv

_STEPS = "/".join(str(prompts) for prompts in STEP_PROMPTS)
LEGEND = f"""\
- cosine: of the estimator's expected gradient with the oracle's, the pool's noise taken out (may come out above 1); 95%
  interval over prompts, none where |G|² or |E|² is not clearly above 0.
- raw: the same as it is, noise included. A faithful estimator lies between the ceiling (as noisy as the oracle) and its
  square root (no noise of its own).
- bias²: of the expected gradient, over |G|², an unbiased estimate (may come out below 0); `-` where the estimator's
  scale means nothing. bias² scaled: after the best scaling, 1 - cosine².
- error of a step: root mean square over |G|, after that scaling, with {_STEPS} prompts a step.
- cosine of a step: expected, with the gradient, for {_STEPS} prompts.
- signs: share of projected coordinates in which a simulated step of 32 prompts agrees with the oracle's sign.
- SNR: signal along the gradient over the noise of one group of one prompt."""


def table_rows(rows: Sequence[FidelityRow]) -> list[dict[str, str]]:
    """Rounded cells, one row for each estimator and group size; a refusal stands in the last column."""
    return [_cells(row) for row in rows]


def _cells(row: FidelityRow) -> dict[str, str]:
    cells = {"m": str(row.group_size), "estimator": row.estimator}
    found = row.values
    if not found:
        return cells | {"note": f"refused: {row.note}"}
    return cells | {
        "cosine": _with_interval(found["cosine"]),
        "raw": _with_interval(found["cosine_raw"]),
        "bias²": _number(found["bias2"]) if row.in_reward_units else "-",
        "bias² scaled": _number(found["bias2_scaled"]),
        f"error of a step, {_STEPS}": _three(found, "rmse"),
        f"cosine of a step, {_STEPS}": _three(found, "step_cosine"),
        "signs": _number(found["sign_agreement_32"]),
        "SNR": _number(found["snr"], digits=3),
        "note": row.note,
    }


def fidelity_table(rows: Sequence[FidelityRow]) -> str:
    """The markdown table; the column of notes only where there are any."""
    cells = table_rows(rows)
    columns = list(dict.fromkeys(key for row in cells for key in row if key != "note"))
    return markdown_table(cells, [*columns, "note"] if any(row["note"] for row in cells) else columns)


def ceiling_lines(ceiling: Mapping[str, Estimate]) -> str:
    """What the oracles of the two halves say of each other, as sentences."""
    lines = [
        f"Noise ceiling, the cosine of the two halves' oracles: {_with_interval(ceiling['ceiling'])} "
        f"(their coordinates agree in sign in {_number(ceiling['sign_agreement'])}).",
        f"Length of the best-of-N gradient, |G|: {_number(ceiling['norm'], digits=3)}.",
    ]
    if math.isnan(ceiling["norm"].value):
        lines.append(
            "The oracles' product is negative: this pool is too small to see the gradient at all. Raise --pool."
        )
    elif math.isnan(ceiling["norm"].low):
        lines.append(
            "Over resampled prompts the oracles' product is often negative: take more prompts or a larger pool."
        )
    return "\n".join(lines)


def write_csv_rows(path: Path, rows: Sequence[FidelityRow]) -> None:
    """Every figure in full, with `_low` and `_high` where it has an interval."""
    result: list[dict[str, Any]] = []
    for row in rows:
        flat: dict[str, Any] = {"estimator": row.estimator, "m": row.group_size, "in_reward_units": row.in_reward_units}
        for name, estimate in row.values.items():
            flat[name] = estimate.value
            if not math.isnan(estimate.low):
                flat |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        result.append(flat | {"note": row.note})
    write_csv(path, result)


def plot_fidelity(path: Path, report: FidelityReport, *, target_n: int) -> None:
    """Corrected cosines with intervals and raw ones for every estimator and m, and the noise ceiling."""
    from matplotlib.figure import Figure  # not pyplot: no global backend is touched

    rows, ceiling = report.rows, report.ceiling["ceiling"]
    names = list(dict.fromkeys(row.estimator for row in rows if row.values))
    sizes = sorted({row.group_size for row in rows if row.values})
    figure = Figure(figsize=(8, 2 + 0.4 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    for index, m in enumerate(sizes):
        shown = [row for row in rows if row.group_size == m and row.values]
        height = [names.index(row.estimator) + 0.6 * ((index + 0.5) / len(sizes) - 0.5) for row in shown]
        cosines = [row.values["cosine"] for row in shown]
        (points,) = axes.plot([each.value for each in cosines], height, "o", label=f"m = {m}")
        color = points.get_color()
        axes.hlines(height, [each.low for each in cosines], [each.high for each in cosines], color=color)
        axes.plot([row.values["cosine_raw"].value for row in shown], height, "o", mfc="none", mec=color)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvline(ceiling.value, color="black", linestyle="--", linewidth=0.8, label="noise ceiling")
    if ceiling.value > 0:
        axes.axvline(
            ceiling.value**0.5, color="black", linestyle=":", linewidth=0.8, label="its root: most that ○ can be"
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(*_limits(rows))
    axes.set_xlabel(
        f"cosine with the best-of-{target_n} gradient (●: pool's noise taken out, 95% over prompts; ○: raw)"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def _limits(rows: Sequence[FidelityRow]) -> tuple[float, float]:
    """Room for every point and for intervals up to 1.5: a figure without signal has intervals without end."""
    values = [x for row in rows if row.values for x in row.values["cosine"] if not math.isnan(x)]
    return max(-1.5, min([0.0, *values]) - 0.05), min(1.5, max([1.0, *values]) + 0.05)


def _number(estimate: Estimate, digits: int = 2) -> str:
    return "-" if math.isnan(estimate.value) else f"{estimate.value:.{digits}f}"


def _with_interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{_number(estimate)} (no interval)"
    return f"{_number(estimate)} ({estimate.low:.2f} to {estimate.high:.2f})"


def _three(found: Mapping[str, Estimate], name: str) -> str:
    return " / ".join(_number(found[f"{name}_{prompts}"]) for prompts in STEP_PROMPTS)
