"""Plots of gradient fidelity over the group size, the tail level and the tail index of the rewards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global backend is touched

from tealightning.diagnostics.measurements import M_SWEEP
from tealightning.diagnostics.slopes import SlopeFit, fit_log_slope

Row = Mapping[str, Any]

FIT_FROM = 64
"""Slopes are fitted from this m on: below, the tail is a handful of rollouts and no power law holds."""


def slopes(rows: Sequence[Row]) -> dict[str, SlopeFit | None]:
    """How the bias of each estimator in units of the reward falls with m >= 64, on log-log axes; None without a fit."""
    result: dict[str, SlopeFit | None] = {}
    for label, found in _by_estimator(rows).items():
        if all(row["units"] == "reward" for row in found):
            fitted = [(r["m"], r["controlled_bias"], r["controlled_bias_se"]) for r in found if r["m"] >= FIT_FROM]
            m, bias, error = torch.tensor(fitted, dtype=torch.float64).view(-1, 3).T
            result[label] = fit_log_slope(m, bias, error)
    return result


def plot_bias(rows: Sequence[Row], path: Path) -> None:
    """|bias| against m, with the fitted slope and its 95% interval in the legend."""
    fits = slopes(rows)
    figure, (axes,) = _figure(1, legend_width=4.4)
    for label, style in _styles(rows).items():
        if label in fits:
            found = _by_estimator(rows)[label]
            _line(axes, found, "m", "controlled_bias", f"{label}: {describe(fits[label])}", style, drop_noise=True)
    axes.set(ylabel="|bias| of the gradient, reward units")
    _finish(figure, path, f"Bias against the group size, normal rewards; slopes from m = {FIT_FROM}", [axes])


def describe(fit: SlopeFit | None) -> str:
    """`slope -0.91 [-0.92, -0.90]`."""
    if fit is None:
        return "no slope above the noise"
    low, high = fit.interval
    return f"slope {fit.slope:.2f} [{low:.2f}, {high:.2f}]"


def plot_cosine(rows: Sequence[Row], path: Path) -> None:
    """1 - cosine of the expected gradient, and of single steps, against m."""
    figure, panels = _figure(2)
    names = {"cosine": "of the expected gradient", "step_cosine@32": "of a step over 32 prompts, mean"}
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        rest = [{**row, "rest": 1 - row[key], "rest_se": row[f"{key}_se"]} for row in rows if "cosine" in row]
        for label, style in _styles(rows).items():
            _line(axes, _by_estimator(rest)[label], "m", "rest", label, style, drop_noise=True)
        axes.set(ylabel=f"1 - cosine to the truth, {name}")
    _finish(figure, path, "Direction against the group size, normal rewards", panels)


def plot_alpha(rows: Sequence[Row], path: Path) -> None:
    """Angle error (top) and scaled RMSE of a step (bottom) against alpha, a column for each world."""
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    figure = Figure(figsize=(4.2 * len(worlds) + 2.2, 7.5), layout="constrained")
    grid = figure.subplots(2, len(worlds), squeeze=False, sharex=True)
    names = {"scaled_bias": "angle error", "scaled_rmse@32": "scaled RMSE of a step over 32 prompts"}
    for column, world in enumerate(worlds):
        found = _by_estimator([row for row in rows if row["world"] == world])
        for axes, (key, name) in zip(grid[:, column], names.items(), strict=True):
            for label, style in _styles(rows).items():
                _line(axes, found.get(label, []), "alpha", key, label, style)
            axes.set(ylabel=name if column == 0 else "", ylim=(0, None))
        grid[0, column].set_title(world)
        grid[1, column].set_xlabel("alpha, upper share that counts as the tail")
    _finish(figure, path, "Sensitivity to the tail level")


def plot_tail_index(rows: Sequence[Row], path: Path) -> None:
    """Angle error, bias over true norm and scaled RMSE against the true tail index of generalised Pareto rewards."""
    figure, panels = _figure(3)
    names = ("scaled_bias", "normalised_bias", "scaled_rmse@32")
    titles = ("angle error", "|bias| / |true gradient|", "scaled RMSE of a step over 32 prompts")
    indexed = [{**row, "shape": float(row["world"].removeprefix("gpd_"))} for row in rows]
    for axes, key, title in zip(panels, names, titles, strict=True):
        kept = [row for row in indexed if key != "normalised_bias" or row["units"] == "reward"]
        for label, style in _styles(rows).items():
            _line(axes, _by_estimator(kept).get(label, []), "shape", key, label, style)
        axes.set(xlabel="tail index of the rewards (0: exponential)", ylabel=title, ylim=(0, None))
    _finish(figure, path, "Sensitivity to the tail index")


PLOTS = {
    "m": (("bias_vs_m.png", plot_bias), ("cosine_vs_m.png", plot_cosine)),
    "alpha": (("alpha.png", plot_alpha),),
    "tail": (("tail_index.png", plot_tail_index),),
}
"""Sweep -> its files."""


def _by_estimator(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measured rows by label, in order of appearance."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        if "cosine" in row:
            result.setdefault(row["estimator"], []).append(row)
    return result


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every estimator: the same in all panels of a figure."""
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    return {
        label: {
            "color": colours[i % 10],
            "marker": "os^vDP*X<>"[(i + i // 10) % 10],
            "linestyle": ("-", "--", ":")[i // 10 % 3],
        }
        for i, label in enumerate(_by_estimator(rows))
    }


def _figure(panels: int, legend_width: float = 2.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * panels + legend_width, 5.2), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _line(
    axes: Axes, rows: Sequence[Row], x: str, y: str, label: str, style: Mapping[str, Any], drop_noise: bool = False
) -> None:
    """Points with error bars; with `drop_noise`, without those below two standard errors (no logarithm)."""
    kept = [row for row in rows if not drop_noise or row[y] > 2 * row[f"{y}_se"]]
    values, errors = [row[y] for row in kept], [row[f"{y}_se"] for row in kept]
    axes.errorbar([row[x] for row in kept], values, yerr=errors, label=label, ms=4, lw=1.2, capsize=2, **style)


def _finish(figure: Figure, path: Path, title: str, over_m: Sequence[Axes] = ()) -> None:
    for axes in over_m:
        axes.set(xscale="log", yscale="log", xlabel="m, rollouts a prompt")
        axes.set_xticks(M_SWEEP, labels=[str(m) for m in M_SWEEP])
        axes.set_xticks([], minor=True)
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
