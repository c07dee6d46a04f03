"""Reports of gradient fidelity, in analytic worlds and on a policy: tables, pages and CSV files of result rows."""

import math
from collections.abc import Sequence
from pathlib import Path

from tealightning.diagnostics.fidelity import BATCHES, Figures, Row
from tealightning.diagnostics.plots import FIT_FROM, PLOTS, bias_slopes, plot_cosines, plot_sweep
from tealightning.diagnostics.worlds import build_world
from tealightning.reporting.provenance import provenance_lines
from tealightning.reporting.tables import markdown_table, write_csv

_STEPS = "/".join(str(prompts) for prompts in BATCHES)


def measured(row: Row, key: str) -> str:
    """`value ± standard error`, as many digits as the error has meaning; "-" where there is no figure."""
    value, error = row.get(key, math.nan), row.get(f"{key}_se", math.nan)
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3f}"
    decimals = min(5, max(0, -math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _number(row: Row, key: str, digits: int = 2) -> str:
    value = row.get(key, math.nan)
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _with_interval(row: Row, key: str) -> str:
    has_interval = f"{key}_low" in row
    interval = f"{row[f'{key}_low']:.2f} to {row[f'{key}_high']:.2f}" if has_interval else "no interval"
    return f"{_number(row, key)} ({interval})"


def _mark(note: str, footnotes: list[str]) -> str:
    """` (1)`, the number of a note among `footnotes`, to which it is added; empty without a note."""
    if note and note not in footnotes:
        footnotes.append(note)
    return f" ({footnotes.index(note) + 1})" if note else ""


def _with_footnotes(table: str, footnotes: Sequence[str]) -> str:
    return "\n\n".join([table, *(f"({i}) {note}" for i, note in enumerate(footnotes, 1))])


def _write(folder: Path, name: str, parts: Sequence[str], rows: Sequence[Row], source: dict[str, str]) -> list[Path]:
    """Write the page NAME.md and, with the command, commit and seed in every row if there is a source, NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    page, table = folder / f"{name}.md", folder / f"{name}.csv"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_csv(table, [row | {key: source[key] for key in ("command", "commit", "seed") if source} for row in rows])
    return [page, table]


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


def world_table(rows: Sequence[Row], directions: Sequence[str], columns: Sequence[str] | None = None) -> str:
    """The markdown table of one world, notes as footnotes; `columns` picks some of them."""
    footnotes: list[str] = []
    lines = []
    for row in rows:
        raw: Row = row if row.get("units") == "reward" else {}
        line = {"estimator": f"`{row['estimator']}`{_mark(row.get('note', ''), footnotes)}", "m": str(row["m"])}
        line |= {"N": str(row["target_n"]), "alpha": f"{row['alpha']:g}"}
        line |= {"angle error": measured(row, "scaled_bias"), "cosine": measured(row, "cosine")}
        line[f"step cosine {_STEPS}"] = _at_batches(row, "step_cosine")
        line[f"signs {_STEPS}"] = _at_batches(row, "sign_agreement")
        line["noise/signal"] = measured(row, "noise_over_signal")
        line["rms(A)/signal"] = measured(row, "rms_advantage_over_signal")
        line[f"scaled RMSE {_STEPS}"] = _at_batches(row, "scaled_rmse")
        line |= {f"bias, {direction}": measured(raw, f"bias[{direction}]") for direction in directions}
        line |= {"bias norm": measured(raw, "bias"), "bias/true": measured(raw, "normalised_bias")}
        lines.append(line | {f"RMSE {_STEPS}": _at_batches(raw, "rmse")})
    return _with_footnotes(markdown_table(lines, columns), footnotes)


def _at_batches(row: Row, key: str) -> str:
    keys = [f"{key}@{batch}" for batch in BATCHES]
    if not any(math.isfinite(row.get(each, math.nan)) for each in keys):
        return "-"
    return " / ".join(_number(row, each, 3 if abs(row[each]) < 10 else 1) for each in keys)


def table_of_world(rows: Sequence[Row], name: str) -> str:
    """The exact gradient in a world and the table of its estimators."""
    rows = [row for row in rows if row["sweep"] == "main" and row["world"] == name]
    world = build_world(name)
    parts = []
    for target_n in dict.fromkeys(row["target_n"] for row in rows):
        gradient = zip(world.exact_gradient(target_n).tolist(), world.directions, strict=True)
        exact = ", ".join(f"{value:.4g} ({direction})" for value, direction in gradient)
        parts.append(f"Exact gradient at N = {target_n}: {exact}.")
    return "\n\n".join([*parts, world_table(rows, world.directions)])


SLOPE_LEGEND = f"""\
The slope of log |bias| in log m from m = {FIT_FROM} on, by weighted least squares, for the estimators in units of the
reward. The bias is by control variates. The 95% interval is widened by the points' misfit: where the bias follows no
single power, the slope is a mean over the range. Biases below two standard errors take no part."""
_TITLES = {"m": "Over the group size", "alpha": "Over alpha", "tail": "Over the tail index"}


def write_fidelity(folder: Path, rows: Sequence[Row], source: dict[str, str], *, groups: int) -> list[Path]:
    """Write `fidelity.md`, `fidelity.csv` and the plots of the sweeps; returns the files."""
    parts = ["# Gradient fidelity", provenance_lines(source | {"groups": f"{groups:,} for each figure"}), LEGEND]
    for world in dict.fromkeys(row["world"] for row in rows if row["sweep"] == "main"):
        parts += [f"## {world}", table_of_world(rows, world)]
    by_sweep = {sweep: [row for row in rows if row["sweep"] == sweep] for sweep in _TITLES}
    by_sweep = {sweep: own for sweep, own in by_sweep.items() if own}
    for sweep, own in by_sweep.items():
        parts += _sweep_text(sweep, own)
    files = _write(folder, "fidelity", parts, rows, source)
    return files + [file for sweep, own in by_sweep.items() for file in plot_sweep(sweep, own, folder)]


def _sweep_text(sweep: str, rows: Sequence[Row]) -> list[str]:
    """The section of a sweep: what is fixed, slopes, what was left out, plots."""
    fixed = {key: rows[0][key] for key in ("m", "target_n", "alpha") if len({row[key] for row in rows}) == 1}
    at = ", ".join(f"{'N' if key == 'target_n' else key} = {value:g}" for key, value in fixed.items())
    parts = [f"## {_TITLES[sweep]}", f"At {at}."]
    if sweep == "m":
        lines = []
        for label, slope in bias_slopes(rows).items():
            line = {"estimator": f"`{label}`", "slope [95%]": slope.removeprefix("slope ")}
            own = sorted((row for row in rows if row["estimator"] == label), key=lambda row: row["m"])
            lines.append(line | {f"bias, m={row['m']}": measured(row, "controlled_bias") for row in own})
        parts += [SLOPE_LEGEND, markdown_table(lines)]
    refused = dict.fromkeys(f"`{r['estimator']}` at m = {r['m']}: {r['note']}" for r in rows if "cosine" not in r)
    parts += [f"Left out: {'; '.join(refused)}"] if refused else []
    return parts + [f"![{file}]({file})" for file in PLOTS[sweep]]


DECISION_LEGEND = """\
Final probability of arm B, mean and [lowest, highest] over {seeds} seeds. `A ~ N(0, 1)`, `B ~ N(-1.406, 1.6^2)`: A has
the larger mean and the larger best of 16, B the larger best of 128 and beyond, so 1 is right in every column. Softmax
policy over the arms from equal probabilities, 64 prompts a step, 300 Adam steps at 0.03, advantages over their root
mean square."""


def write_decisions(folder: Path, rows: Sequence[Row], source: dict[str, str], *, seeds: int) -> list[Path]:
    """Write `decision.md`, a line for every estimator and a column for every (m, N), and `decision.csv`."""
    footnotes: list[str] = []
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["estimator"], {"estimator": f"`{row['estimator']}`"})
        shown = f"{row['mean']:.3f} [{row['lowest']:.3f}, {row['highest']:.3f}]" if "mean" in row else "-"
        line[f"m={row['m']}, N={row['target_n']}"] = shown + _mark(row["note"], footnotes)
    table = _with_footnotes(markdown_table(list(lines.values())), footnotes)
    parts = ["# A decision", provenance_lines(source), DECISION_LEGEND.format(seeds=seeds), table]
    return _write(folder, "decision", parts, rows, source)


POLICY_LEGEND = f"""\
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


def policy_table(rows: Sequence[Row]) -> str:
    """The markdown table, a line for each group size and estimator; the column of notes only where there are any."""
    lines = []
    for row in rows:
        line = {"m": str(row["m"]), "estimator": row["estimator"]}
        if "cosine" not in row:
            lines.append(line | {"note": f"refused: {row['note']}"})
            continue
        line |= {"cosine": _with_interval(row, "cosine"), "raw": _with_interval(row, "cosine_raw")}
        line |= {"bias²": _number(row, "bias2") if row["units"] == "reward" else "-"}
        line |= {"bias² scaled": _number(row, "bias2_scaled")}
        for name, key in (("error of a step", "rmse"), ("cosine of a step", "step_cosine")):
            line[f"{name}, {_STEPS}"] = " / ".join(_number(row, f"{key}_{prompts}") for prompts in BATCHES)
        line |= {"signs": _number(row, "sign_agreement_32"), "SNR": _number(row, "snr", digits=3), "note": row["note"]}
        lines.append(line)
    columns = list(dict.fromkeys(key for line in lines for key in line if key != "note"))
    return markdown_table(lines, [*columns, "note"] if any(line["note"] for line in lines) else columns)


def ceiling_text(ceiling: Figures) -> str:
    """How far the oracles of the two halves agree, as sentences."""
    lines = [
        f"Noise ceiling, the cosine of the two halves' oracles: {_with_interval(ceiling, 'ceiling')} "
        f"(their coordinates agree in sign in {_number(ceiling, 'sign_agreement')}).",
        f"Length of the best-of-N gradient, |G|: {_number(ceiling, 'norm', digits=3)}.",
    ]
    if math.isnan(ceiling["norm"]):
        lines.append(
            "The oracles' product is negative: this pool is too small to see the gradient at all. Raise --pool."
        )
    elif "norm_low" not in ceiling:
        lines.append(
            "Over resampled prompts the oracles' product is often negative: take more prompts or a larger pool."
        )
    return "\n".join(lines)


def write_policy_fidelity(
    folder: Path, ceiling: Figures, rows: Sequence[Row], source: dict[str, str], facts: Sequence[str], *, target_n: int
) -> list[Path]:
    """Write `policy_fidelity.md`, `.csv` and `.png`; returns the files. `facts` say what was measured."""
    title = f"# Fidelity to the best-of-{target_n} gradient of a live policy"
    origin = "\n".join([provenance_lines(source), *(f"- {fact}" for fact in facts)])
    parts = [title, origin, f"{ceiling_text(ceiling)}\n\n{policy_table(rows)}", POLICY_LEGEND]
    lines = []
    for row in rows:
        line = {"estimator": row["estimator"], "m": row["m"], "in_reward_units": row["units"] == "reward"}
        figures = {key: value for key, value in row.items() if key not in ("estimator", "m", "units", "note")}
        lines.append(line | figures | {"note": row["note"]})
    files = _write(folder, "policy_fidelity", parts, lines, {})
    plot_cosines(folder / "policy_fidelity.png", rows, ceiling["ceiling"], target_n=target_n)
    return [*files, folder / "policy_fidelity.png"]
