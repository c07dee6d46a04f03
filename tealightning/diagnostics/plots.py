"""Plots of the reports: figures over m, alpha or tail index; cosines on a policy; QQ line and predictions of a tail."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global backend is touched

from tealightning.diagnostics.fidelity import Row, fit_log_slope
from tealightning.functional import tail_shape
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail_checks import TailChecks
from tealightning.reporting import style

# Slopes are fitted from this m on: below, the tail is a handful of rollouts and no power law holds.
FIT_FROM = 64


def bias_slopes(rows: Sequence[Row]) -> dict[str, str]:
    """How the bias of each estimator in units of the reward falls with m >= 64 on log-log axes: `slope -0.91 [-0.92,
    -0.90]`."""
    slopes = {}
    for label in dict.fromkeys(row["estimator"] for row in rows if "cosine" in row):
        own = [row for row in rows if row["estimator"] == label and "cosine" in row]
        if all(row["units"] == "reward" for row in own):
            points = [(r["m"], r["controlled_bias"], r["controlled_bias_se"]) for r in own if r["m"] >= FIT_FROM]
            fit = fit_log_slope(*torch.tensor(points, dtype=torch.float64).view(-1, 3).T)
            slopes[label] = f"slope {fit}" if fit else "no slope above the noise"
    return slopes


PLOTS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "m": {
        "bias_vs_m.png": ("Bias against the group size, normal rewards; slopes from m = 64", ("controlled_bias",)),
        "cosine_vs_m.png": ("Direction against the group size, normal rewards", ("cosine", "step_cosine@32")),
    },
    "alpha": {"alpha.png": ("Sensitivity to the tail level", ("scaled_bias", "scaled_rmse@32"))},
    "tail": {"tail_index.png": ("Sensitivity to the tail index", ("scaled_bias", "normalised_bias", "scaled_rmse@32"))},
}
"""Sweep -> its files, with title and figures, a panel each."""
_X_LABELS = {
    "m": "m, rollouts a prompt",
    "alpha": "alpha, upper share that counts as the tail",
    "tail": "tail index of the rewards (0: exponential)",
}
_PANELS = {
    "controlled_bias": "|bias| of the gradient, reward units",
    "cosine": "1 - cosine to the truth, of the expected gradient",
    "step_cosine@32": "1 - cosine to the truth, of a step over 32 prompts, mean",
    "scaled_bias": "angle error",
    "normalised_bias": "|bias| / |true gradient|",
    "scaled_rmse@32": "scaled RMSE of a step over 32 prompts",
}


def plot_sweep(sweep: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the plots of a sweep, with a panel for each figure (over alpha, and each world); returns the files."""
    rows = [row for row in rows if "cosine" in row]
    slopes = bias_slopes(rows) if sweep == "m" else {}
    worlds = list(dict.fromkeys(row["world"] for row in rows)) if sweep == "alpha" else [""]
    for file, (title, keys) in PLOTS[sweep].items():
        is_of_bias = "controlled_bias" in keys
        labels = {name: f"{name}: {slope}" for name, slope in slopes.items() if is_of_bias}
        shown = [row for row in rows if row["estimator"] in labels or not is_of_bias]
        panels = [(key, world) for key in keys for world in worlds]
        figure, grid = style.facets(len(panels), columns=len(worlds) if sweep == "alpha" else len(keys), share=False)
        columns = len(style.bottom(grid))
        figure.set_size_inches(4.2 * columns + (4.6 if labels else 2.6), 3.6 * (len(panels) // columns) + 1.4)
        looks = style.styles(dict.fromkeys(row["estimator"] for row in shown))
        for axes, (key, world) in zip(grid, panels, strict=True):
            _plot_lines(axes, sweep, key, [row for row in shown if world in ("", row["world"])], looks, labels)
            axes.set_title(world)
        figure.suptitle(title, x=0.01, ha="left")
        style.legend_outside(figure, grid[0])
        figure.savefig(folder / file, dpi=120)
    return [folder / file for file in PLOTS[sweep]]


def _plot_lines(
    axes: Axes, sweep: str, key: str, rows: Sequence[Row], looks: Mapping[str, style.Style], labels: Mapping[str, str]
) -> None:
    """One panel; over m the axes are logarithmic, without points below two standard errors, which have no logarithm."""
    is_log = sweep == "m"
    points = []
    for row in rows:
        x = float(row["world"].removeprefix("gpd_")) if sweep == "tail" else row[sweep]
        value = 1 - row[key] if "cosine" in key else row[key]
        has_scale = key != "normalised_bias" or row["units"] == "reward"
        if has_scale and (not is_log or value > 2 * row[f"{key}_se"]):
            points.append((row["estimator"], x, value, row[f"{key}_se"]))
    for name, look in looks.items():
        x_values, values, errors = ([each[i] for each in points if each[0] == name] for i in (1, 2, 3))
        axes.errorbar(x_values, values, yerr=errors, label=labels.get(name, name), capsize=2, **look.options)
    axes.set(xlabel=_X_LABELS[sweep], ylabel=_PANELS[key])
    style.grid_lines(axes)
    if is_log:
        ticks = sorted({row["m"] for row in rows})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.set(ylim=(0, None))


def plot_cosines(path: Path, rows: Sequence[Row], ceiling: float, *, target_n: int) -> None:
    """Corrected cosines with intervals and raw ones on a policy, for every estimator and m, and the noise ceiling."""
    rows = [row for row in rows if "cosine" in row]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    sizes = sorted({row["m"] for row in rows})
    figure = Figure(figsize=(8, 2 + 0.4 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    shown = [0.0, 1.0]
    for index, m in enumerate(sizes):
        own = [row for row in rows if row["m"] == m]
        heights = [names.index(row["estimator"]) + 0.6 * ((index + 0.5) / len(sizes) - 0.5) for row in own]
        keys = ("cosine", "cosine_low", "cosine_high", "cosine_raw")
        values, lows, highs, raw = ([row.get(key, np.nan) for row in own] for key in keys)
        (points,) = axes.plot(values, heights, "o", label=f"m = {m}")
        axes.hlines(heights, lows, highs, color=points.get_color())
        axes.plot(raw, heights, "o", mfc="none", mec=points.get_color())
        shown += [*values, *lows, *highs]
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvline(ceiling, color="black", linestyle="--", linewidth=0.8, label="noise ceiling")
    if ceiling > 0:
        label = "its root: most that ○ can be"
        axes.axvline(ceiling**0.5, color="black", linestyle=":", linewidth=0.8, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    # room for every point, and for intervals up to 1.5: a figure without signal has intervals without end
    axes.set_xlim(max(-1.5, np.nanmin(shown) - 0.05), min(1.5, np.nanmax(shown) + 0.05))
    what = "●: pool's noise taken out, 95% over prompts; ○: raw"
    axes.set_xlabel(f"cosine with the best-of-{target_n} gradient ({what})")
    style.grid_lines(axes)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def plot_qq(checks: TailChecks, path: Path) -> None:
    """Plot the upper tails of all prompts, moved and scaled to a Gaussian's mean and spread and averaged rank by rank,
    against Gaussian order statistics; the band holds 95% of such averages of Gaussian samples."""
    size, k = checks.samples.shape[1], checks.tested.shape[1]
    expected, null = tail_shape.expected_normal_order_statistics(size, k), tail_shape.gaussian_tail_null(size, k)
    mean = mean_over_prompts(tail_shape.standardised_tail(checks.tested, size))
    half = 1.96 * null.profile_std / mean.num_prompts.double().sqrt()
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    band = (null.profile_mean - half, null.profile_mean + half)
    axes.fill_between(expected, *band, color="0.8", label="Gaussian, 95%")
    axes.plot(expected, null.profile_mean, color="0.4", linewidth=1, label="Gaussian")
    label = f"rewards, mean of {int(mean.num_prompts[0])} prompts"
    axes.errorbar(expected, mean.mean, yerr=1.96 * mean.standard_error, fmt="o", ms=3, lw=1, label=label)
    axes.set(xlabel=f"expected order statistics of {size} standard normals, upper {k}", ylabel="standardised rewards")
    style.grid_lines(axes)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_prediction(rows: Sequence[Row], m: int, path: Path) -> None:
    """Plot predicted (from m samples) and measured best-of-n of `prediction_rows`, with two standard errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for name, label in (("measured", "measured on the others"), ("predicted", f"predicted from {m}")):
        errors = 2 * column[f"{name}_se"]
        axes.errorbar(column["n"], column[name], yerr=errors, marker="o", ms=4, capsize=3, label=label)
    unbiased = column["predicted"] - column["gaussian_error"]
    axes.plot(column["n"], unbiased, "--", color="0.4", label="predicted, without its bias for a Gaussian")
    style.log_n_axis(axes, [row["n"] for row in rows])
    y_label = "best-of-n above the mean\n(reward standard deviations)"
    axes.set(xlabel="n (samples a prompt, the best one kept)", ylabel=y_label)
    style.grid_lines(axes)
    axes.legend()
    figure.savefig(path, dpi=150)
