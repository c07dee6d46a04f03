"""Plots of the reports: figures over m, alpha or tail index; cosines on a policy; QQ line and predictions of a tail."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: no global backend is touched

from tealightning.diagnostics.fidelity import Row, SlopeFit, fit_log_slope
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail_checks import TailChecks
from tealightning.functional.tail_shape import expected_normal_order_statistics, gaussian_tail_null, standardised_tail
from tealightning.reporting.style import bottom, facets, grid_lines, legend_outside, log_n_axis, styles

FIT_FROM = 64
"""Slopes are fitted from this m on: below, the tail is a handful of rollouts and no power law holds."""
PLOTS = {"m": ("bias_vs_m.png", "cosine_vs_m.png"), "alpha": ("alpha.png",), "tail": ("tail_index.png",)}
"""Sweep -> its files."""


def plot_sweep(sweep: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the plots of a sweep into `folder`; returns the files."""
    rows = [row for row in rows if "cosine" in row]
    paths = [folder / name for name in PLOTS[sweep]]
    if sweep == "m":
        fits = bias_slopes(rows)
        with_scale = [row for row in rows if row["estimator"] in fits]
        labels = {label: f"{label}: {describe_slope(fit)}" for label, fit in fits.items()}
        title = f"Bias against the group size, normal rewards; slopes from m = {FIT_FROM}"
        panels = {"controlled_bias": "|bias| of the gradient, reward units"}
        _plot_lines(with_scale, paths[0], title, "m", "m, rollouts a prompt", panels, labels=labels, log=True)
        panels = {
            "cosine": "1 - cosine to the truth, of the expected gradient",
            "step_cosine@32": "1 - cosine to the truth, of a step over 32 prompts, mean",
        }
        rest = [row | {key: 1 - row[key] for key in panels} for row in rows]
        title = "Direction against the group size, normal rewards"
        _plot_lines(rest, paths[1], title, "m", "m, rollouts a prompt", panels, log=True)
    elif sweep == "alpha":
        panels = {"scaled_bias": "angle error", "scaled_rmse@32": "scaled RMSE of a step over 32 prompts"}
        x_label = "alpha, upper share that counts as the tail"
        _plot_lines(rows, paths[0], "Sensitivity to the tail level", "alpha", x_label, panels, by_world=True)
    else:
        panels = {
            "scaled_bias": "angle error",
            "normalised_bias": "|bias| / |true gradient|",
            "scaled_rmse@32": "scaled RMSE of a step over 32 prompts",
        }
        indexed = [row | {"shape": float(row["world"].removeprefix("gpd_"))} for row in rows]
        for row in indexed:
            if row["units"] != "reward":
                del row["normalised_bias"]
        x_label = "tail index of the rewards (0: exponential)"
        _plot_lines(indexed, paths[0], "Sensitivity to the tail index", "shape", x_label, panels)
    return paths


def bias_slopes(rows: Sequence[Row]) -> dict[str, SlopeFit | None]:
    """How the bias of each estimator in units of the reward falls with m >= 64, on log-log axes; None without a fit."""
    slopes: dict[str, SlopeFit | None] = {}
    for label in dict.fromkeys(row["estimator"] for row in rows if "cosine" in row):
        own = [row for row in rows if row["estimator"] == label and "cosine" in row]
        if all(row["units"] == "reward" for row in own):
            points = [(r["m"], r["controlled_bias"], r["controlled_bias_se"]) for r in own if r["m"] >= FIT_FROM]
            slopes[label] = fit_log_slope(*torch.tensor(points, dtype=torch.float64).view(-1, 3).T)
    return slopes


def describe_slope(fit: SlopeFit | None) -> str:
    """`slope -0.91 [-0.92, -0.90]`."""
    if fit is None:
        return "no slope above the noise"
    low, high = fit.interval
    return f"slope {fit.slope:.2f} [{low:.2f}, {high:.2f}]"


def _plot_lines(
    rows: Sequence[Row],
    path: Path,
    title: str,
    x: str,
    x_label: str,
    panels: Mapping[str, str],
    *,
    labels: Mapping[str, str] | None = None,
    by_world: bool = False,
    log: bool = False,
) -> None:
    """A line with error bars for each estimator, in a panel for each figure.

    Args:
        rows: Measured rows; one without a panel's figure is left out there.
        path: File to write.
        title: Title of the whole plot.
        x: Key of the horizontal axis.
        x_label: Its label.
        panels: Keys of the figures, with the labels of their axes.
        labels: Estimators with their entries in the legend, if these say more than the name.
        by_world: A column for each world and a row for each figure, instead of a column for each figure.
        log: Logarithmic axes, without the points below two standard errors (they have no logarithm).
    """
    worlds = list(dict.fromkeys(row["world"] for row in rows)) if by_world else [None]
    panel_of = [(key, world) for key in panels for world in worlds]
    figure, grid = facets(len(panel_of), columns=len(worlds) if by_world else len(panels), share=False)
    figure.set_size_inches(
        4.2 * len(bottom(grid)) + (4.6 if labels else 2.6), 3.6 * (len(panel_of) // len(bottom(grid))) + 1.4
    )
    look = styles(dict.fromkeys(row["estimator"] for row in rows))
    for axes, (key, world) in zip(grid, panel_of, strict=True):
        inside = [row for row in rows if key in row and world in (None, row["world"])]
        for estimator, style in look.items():
            points = [row for row in inside if row["estimator"] == estimator]
            points = [row for row in points if not log or row[key] > 2 * row[f"{key}_se"]]
            at, values, errors = ([row[name] for row in points] for name in (x, key, f"{key}_se"))
            label = (labels or {}).get(estimator, estimator)
            axes.errorbar(at, values, yerr=errors, label=label, capsize=2, **style.options)
        axes.set(xlabel=x_label, ylabel=panels[key], title=world or "")
        grid_lines(axes)
        if log:
            ticks = sorted({row[x] for row in rows})
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
        else:
            axes.set(ylim=(0, None))
    figure.suptitle(title, x=0.01, ha="left")
    legend_outside(figure, grid[0])
    figure.savefig(path, dpi=120)


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
    grid_lines(axes)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def plot_qq(checks: TailChecks, path: Path) -> Path:
    """Plot the upper tails of all prompts against Gaussian order statistics.

    Every tail is moved and scaled to the mean and spread that a Gaussian's has there, then averaged over prompts rank
    by rank. The band is where 95% of such averages of Gaussian samples lie.
    """
    size, k = checks.samples.shape[1], checks.tested.shape[1]
    expected = expected_normal_order_statistics(size, k)
    null = gaussian_tail_null(size, k)
    mean = mean_over_prompts(standardised_tail(checks.tested, size))
    half = 1.96 * null.profile_std / mean.num_prompts.double().sqrt()
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    band = (null.profile_mean - half, null.profile_mean + half)
    axes.fill_between(expected, *band, color="0.8", label="Gaussian, 95%")
    axes.plot(expected, null.profile_mean, color="0.4", linewidth=1, label="Gaussian")
    label = f"rewards, mean of {int(mean.num_prompts[0])} prompts"
    axes.errorbar(expected, mean.mean, yerr=1.96 * mean.standard_error, fmt="o", ms=3, lw=1, label=label)
    axes.set_xlabel(f"expected order statistics of {size} standard normals, upper {k}")
    axes.set_ylabel("standardised rewards")
    grid_lines(axes)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def plot_prediction(rows: Sequence[Row], m: int, path: Path) -> Path:
    """Plot predicted and measured best-of-n on a log-n axis, with two standard errors over prompts.

    Args:
        rows: As `tail.prediction_rows` returns them.
        m: Samples that the predictions are made from.
        path: File to write.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ns = [row["n"] for row in rows]
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for name, label in (("measured", "measured on the others"), ("predicted", f"predicted from {m}")):
        axes.errorbar(ns, column[name], yerr=2 * column[f"{name}_se"], marker="o", ms=4, capsize=3, label=label)
    unbiased = column["predicted"] - column["gaussian_error"]
    axes.plot(ns, unbiased, "--", color="0.4", label="predicted, without its bias for a Gaussian")
    log_n_axis(axes, ns)
    axes.set_xlabel("n (samples a prompt, the best one kept)")
    axes.set_ylabel("best-of-n above the mean\n(reward standard deviations)")
    grid_lines(axes)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
