"""Tables of gradient fidelity for readers, from the rows of `diagnostics.cells`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tealightning.diagnostics.fidelity import BATCHES
from tealightning.reporting.tables import markdown_table

Row = Mapping[str, Any]

LEGEND = """\
One row is one estimator; every figure is against the exact gradient of E[max of N rewards]. `±` is one standard error
(all standard errors are in `fidelity.csv`); steps are over 1, 32 and 256 prompts of m rollouts.

Comparable between **all** estimators, whatever their scale:

- **angle error**: the bias after the best positive scaling, over the true norm: the sine of the angle between the
  expected gradient and the truth (0 = right direction, 1 = a right angle or worse), and **cosine** its cosine;
- **step cosine**: mean cosine of a single step; **signs**: share of coordinates of single steps with the right sign;
- **noise/signal**: standard deviation of one prompt's gradient in the world's directions, over the signal (the expected
  gradient along the true one); **rms(A)/signal**: the noise that the advantages put into every direction that has
  nothing to do with the reward (there, one prompt's noise/signal is this over sqrt(m));
- **scaled RMSE**: of a step, bias and noise together, after the best positive scaling, over the true norm.

Comparable only between estimators **in units of the reward** (`A(s R) = s A(R)`); one that standardises has no scale
to be wrong about, and shows `-`:

- **bias** by direction and its **norm**, **bias/true**: the norm over the true gradient's; **RMSE** of a step.

`-` for noise/signal: the expected gradient does not point the way of the true one."""


def measured(row: Row, key: str) -> str:
    """`value ± standard error`, as many digits as the error has meaning; "-" where there is no figure."""
    value, error = row.get(key, math.nan), row.get(f"{key}_se", math.nan)
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3f}"
    decimals = min(5, max(0, -math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _at_batches(row: Row, key: str) -> str:
    values = [row.get(f"{key}@{batch}", math.nan) for batch in BATCHES]
    return " / ".join(_short(v) for v in values) if any(map(math.isfinite, values)) else "-"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def display_row(row: Row, footnotes: list[str], directions: Sequence[str]) -> dict[str, str]:
    """One line of a table; a note becomes a number in `footnotes`."""
    note = row.get("note", "")
    if note and note not in footnotes:
        footnotes.append(note)
    mark = f" ({footnotes.index(note) + 1})" if note else ""
    raw: Row = row if row.get("units") == "reward" else {}
    return {
        "estimator": f"`{row['estimator']}`{mark}",
        "m": str(row["m"]),
        "N": str(row["target_n"]),
        "alpha": f"{row['alpha']:g}",
        "angle error": measured(row, "scaled_bias"),
        "cosine": measured(row, "cosine"),
        "step cosine 1/32/256": _at_batches(row, "step_cosine"),
        "signs 1/32/256": _at_batches(row, "sign_agreement"),
        "noise/signal": measured(row, "noise_over_signal"),
        "rms(A)/signal": measured(row, "rms_advantage_over_signal"),
        "scaled RMSE 1/32/256": _at_batches(row, "scaled_rmse"),
        **{f"bias, {direction}": measured(raw, f"bias[{direction}]") for direction in directions},
        "bias norm": measured(raw, "bias"),
        "bias/true": measured(raw, "normalised_bias"),
        "RMSE 1/32/256": _at_batches(raw, "rmse"),
    }


def world_table(rows: Sequence[Row], directions: Sequence[str]) -> str:
    """The table of one world with its footnotes."""
    footnotes: list[str] = []
    lines = [display_row(row, footnotes, directions) for row in rows]
    notes = [f"({i}) {note}" for i, note in enumerate(footnotes, 1)]
    return "\n\n".join([markdown_table(lines), *notes])


def decision_table(rows: Sequence[Row]) -> str:
    """Final probability of B, a line for every estimator and a column for every (m, N)."""
    footnotes: list[str] = []
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["estimator"], {"estimator": f"`{row['estimator']}`"})
        line[f"m={row['m']}, N={row['target_n']}"] = _probability(row, footnotes)
    notes = [f"({i}) {note}" for i, note in enumerate(footnotes, 1)]
    return "\n\n".join([markdown_table(list(lines.values())), *notes])


def _probability(row: Row, footnotes: list[str]) -> str:
    note = row["note"]
    if note and note not in footnotes:
        footnotes.append(note)
    mark = f" ({footnotes.index(note) + 1})" if note else ""
    if "mean" not in row:
        return f"-{mark}"
    return f"{row['mean']:.3f} [{row['lowest']:.3f}, {row['highest']:.3f}]{mark}"
