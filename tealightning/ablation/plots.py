"""Plots of an ablation with their captions: over n, over KL, over training, differences, completions, rewards."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tealightning.ablation.tables import DIAGNOSTICS, START, ResultsView, Row, split_name
from tealightning.reporting import style
from tealightning.reporting.style import Curve, Style
from tealightning.reporting.tables import Plot

OVERLAID = 7  # bands of more curves on one pair of axes hide each other: beyond, there are lines without bands
CROWD = 15  # more curves than this say nothing as grey lines in every panel, and make files of megabytes
BARS = ("completion_length", "distinct_2", "self_similarity", "reward_std")
TRAINING_METRICS = {
    "reward_mean": "mean reward of the rollouts",
    "reward_std": "reward spread within a prompt",
    "completion_length": "completion length, tokens",
    "entropy": "entropy, nats a token",
    "kl_per_token": "KL, nats a token",
    "grad_norm": "gradient norm",
    "rollouts_skipped": "rollouts without gradient, fraction",
}


def all_plots(results: dict[str, Any]) -> list[Plot]:
    """Every plot that the results have the numbers for; names are unique."""
    view = ResultsView(results)
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a label is one
        plots = [plot for split in view.splits for plot in _split_plots(view, split)]
        return [*plots, *_kl_plots(view), *_training_plots(view)]


def styles_of(results: dict[str, Any]) -> dict[str, Style]:
    """A style for every variant: the reference black, the policy before training grey and dashed."""
    start = Style(color="#7F7F7F", marker="", line=(0, (4, 2)))
    return style.styles(results["variants"], results["reference"]) | {START: start}


def _split_plots(view: ResultsView, split: str) -> Iterator[Plot]:
    """Plots of one prompt set; those of sets after the main one are fewer, and named after it."""
    is_main = split == view.main_split
    suffix, where, interval = "" if is_main else f"_{split}", split_name(split), view.interval
    for quantity, what in {"best_of_n": "Best-of-n", "gold_best_of_n": "Gold reward of the best of n"}.items():
        curves = over_n(view, split, quantity)
        if curves.keys() - {START}:
            bands = f"bands: {interval} intervals" if len(curves) <= OVERLAID else "intervals are in the table"
            size = (8.6, max(4.4, 0.19 * min(len(curves), 20) + 0.8) - 0.8)
            figure = _overlay(view, {"reward": curves}, "n, samples of which the best is kept", size, below=False)
            style.log_n_axis(figure.axes[0], view.results["ns"])
            figure.axes[0].set_title(f"{what}, {where}")
            yield Plot(
                name=f"{quantity}{suffix}",
                figure=figure,
                caption=f"{what} on the {where}; {bands}.",
                alt=f"{what} against n for every variant and the policy before training, {where}.",
            )
    for key, other in {"reference": view.reference, "start": "the policy before training"}.items():
        if view.at(split, f"against_{key}", view.headline_n):
            yield Plot(
                name=f"difference_to_{key}{suffix}",
                figure=_plot_forest(view, split, f"against_{key}", f"Difference to {other}, {where}"),
                caption=f"Paired differences to {other} on the {where}, {interval} intervals, ordered by the left "
                "panel. A star: significant after correction.",
                alt=f"Forest plot of every variant's difference to {other}, {where}.",
            )
    if is_main and (curves := over_n(view, split, "against_reference")):
        yield Plot(
            name="difference_to_reference_over_n",
            figure=_plot_differences(view, split, curves),
            caption=f"Difference to {view.reference} over n on the {where}, {interval} bands. A star: significant at "
            f"n = {view.headline_n} after correction.",
            alt=f"Difference in best-of-n to {view.reference} against n, a panel for each variant, {where}.",
        )
    columns = {DIAGNOSTICS[key]: view.at(split, f"diagnostics.{key}") for key in BARS}
    if is_main and any(rows.keys() - {START} for rows in columns.values()):
        names = [name for name in view.policies(split) if name != START][::-1]
        yield Plot(
            name="completions",
            figure=_interval_rows(view, names, columns, size=(10, 0.25 * len(names) + 1.2)),
            caption=f"Completions on the {where}, {interval} intervals. Dashed: before training. High "
            "self-similarity and low distinct-2 mean that samples of a prompt repeat each other.",
            alt=f"Length, distinct-2, self-similarity and reward spread of every variant's completions, {where}.",
        )


def _kl_plots(view: ResultsView) -> Iterator[Plot]:
    """Reward against the distance from the start, over the evaluations of training."""
    n, bands = view.headline_n, f" Bands: {view.interval} intervals." if len(view.names) <= OVERLAID else ""
    best, means, golds = over_kl(view, n), over_kl(view, 1) if n != 1 else {}, over_kl(view, n, "gold_best_of_n")

    def figure(panels: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
        size = (9.4 / len(panels), 4.4 + 0.06 * len(view.names))
        return _overlay(view, panels, "KL to the start, nats a completion", size, title=title)

    if best:
        panels = {f"best-of-{n}": best} | ({"mean reward (n = 1)": means} if means else {})
        yield Plot(
            name="best_of_n_against_kl",
            figure=figure(panels, "Reward against KL to the start"),
            caption="Every evaluation of training, from the start (KL 0) to the final policy: the curve on top gets "
            f"more reward for the same distance.{bands}",
            alt=f"Best-of-{n} and mean reward against KL to the start for every variant.",
        )
    if golds:
        panels = {f"training reward, best-of-{n}": best, f"gold reward, best-of-{n}": golds}
        yield Plot(
            name="gold_against_kl",
            figure=figure(panels, "Training reward and gold reward against KL"),
            caption="Where the left curves go on rising and the right ones fall, the training reward is "
            f"over-optimised.{bands}",
            alt=f"Best-of-{n} by the training reward and by the gold reward against KL for every variant.",
        )


def _training_plots(view: ResultsView) -> Iterator[Plot]:
    training, histograms = (view.results.get(key) or {} for key in ("training", "histograms"))
    logged = dict.fromkeys(key for one in training.values() for key in one if key != "step")
    metrics = sorted(logged, key=[*TRAINING_METRICS, *logged].index)
    if metrics:
        bands = " with bands over seeds" if len(view.names) <= OVERLAID else ""
        panels = {
            TRAINING_METRICS.get(metric, metric.replace("_", " ")): {
                name: _curve(training[name]["step"], training[name][metric])
                for name in view.names
                if metric in (training.get(name) or {})
            }
            for metric in metrics
        }
        yield Plot(
            name="training",
            figure=_overlay(view, panels, "step", (4.7, 3.3), columns=2),
            caption=f"Training, means over seeds{bands}.",
            alt=f"Training curves of every variant: {', '.join(metrics)}.",
        )
    if shown := [name for name in view.names if name in (histograms.get("variants") or ())]:
        figure, grid = _panel_each(view, shown, "Rewards before training (grey) and after")
        for axes, name in zip(grid, shown, strict=True):
            axes.stairs(histograms["start"], histograms["edges"], fill=True, color="#D5D5D5")
            color = styles_of(view.results)[name].color
            axes.stairs(histograms["variants"][name], histograms["edges"], color=color, linewidth=1.6)
        figure.supxlabel("reward", fontsize=10)
        figure.supylabel("density", fontsize=10)
        yield Plot(
            name="reward_histograms",
            figure=figure,
            caption="Rewards of single samples before training (grey) and after.",
            alt="Histograms of rewards before and after training, a panel for each variant.",
        )


# Curves: the numbers of a plot


def _curve(xs: Sequence[float], columns: Mapping[str, Sequence[float | None]]) -> Curve:
    """`mean`, `low` and `high` over `xs`; None becomes NaN."""
    values = {key: np.array(columns[key], dtype=float).tolist() for key in ("mean", "low", "high")}
    return Curve(x=[float(x) for x in xs], **values)


def _curve_of(xs: Sequence[float], rows: Sequence[Row]) -> Curve:
    return _curve(xs, {key: [row[key] for row in rows] for key in ("mean", "low", "high")})


def over_n(view: ResultsView, split: str, quantity: str) -> dict[str, Curve]:
    """A curve over n for every policy that has `quantity`."""
    return {name: _curve_of([row["n"] for row in rows], rows) for name, rows in view.curves(split, quantity).items()}


def over_kl(view: ResultsView, n: int, quantity: str = "best_of_n") -> dict[str, Curve]:
    """Reward against KL to the start over the evaluations of training, where at least two of them know both."""
    curves = {}
    for name in view.names if view.results["checkpoints"] else ():
        points = view.results["checkpoints"][name]
        pairs = [(point["kl"], row) for point in points for row in point[quantity] or () if row["n"] == n]
        known = [(kl["mean"], row) for kl, row in pairs if kl and row["mean"] is not None]
        if len(known) > 1:
            curves[name] = _curve_of([kl for kl, _ in known], [row for _, row in known])
    return curves


# Figures


def _overlay(
    view: ResultsView,
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    size: tuple[float, float],
    *,
    columns: int | None = None,
    title: str = "",
    below: bool = True,
) -> Figure:
    """Panels with all curves on one pair of axes, with bands if there are few; their names are the y labels."""
    figure, grid = style.facets(len(panels), columns=columns, size=size, share=False)
    for axes, (ylabel, curves) in zip(grid, panels.items(), strict=True):
        for name, line in curves.items():
            style.draw(axes, line, styles_of(view.results)[name], view.label(name), band=len(curves) <= OVERLAID)
        axes.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        figure.suptitle(title)
    style.legend_outside(figure, grid[0], below=below)
    return figure


def _panel_each(view: ResultsView, names: Collection[str], title: str) -> tuple[Figure, list[Axes]]:
    """A panel for each variant, with its name above."""
    figure, grid = style.facets(len(names))
    for axes, name in zip(grid, names, strict=True):
        style.panel_title(axes, view.label(name))
    figure.suptitle(title)
    return figure, grid


def _plot_differences(view: ResultsView, split: str, curves: Mapping[str, Curve]) -> Figure:
    """Differences to the reference over n, a panel for each variant, the others grey behind it."""
    headline = view.at(split, "against_reference", view.headline_n)
    stars = view.significant(headline)
    figure, grid = _panel_each(view, curves, f"Best-of-n, difference to {view.reference}")
    for axes, name in zip(grid, curves, strict=True):
        for other in curves.values() if len(curves) <= CROWD else ():
            axes.plot(other.x, other.mean, color=style.CONTEXT, linewidth=0.7, zorder=0)
        style.draw(axes, curves[name], styles_of(view.results)[name], view.label(name))
        axes.axhline(0, color="black", linewidth=1)
        if name in stars:
            _star(axes, view.headline_n, headline[name]["mean"])
    style.log_n_axis(grid[0], view.results["ns"])
    for axes in style.bottom(grid):
        axes.set_xlabel("n")
    figure.supylabel("difference", fontsize=10)
    return figure


def _plot_forest(view: ResultsView, split: str, against: str, title: str) -> Figure:
    """Differences at the headline n and at n = 1, a row for each variant, the highest at the headline n on top."""
    headline = view.at(split, against, view.headline_n)
    names = sorted(headline, key=lambda name: headline[name]["mean"])
    columns = {f"best-of-{view.headline_n}": headline} if view.headline_n != 1 else {}
    columns["mean reward (n = 1)"] = view.at(split, against, 1)
    columns = {xlabel: rows for xlabel, rows in columns.items() if rows.keys() >= {*names}}
    figure = _interval_rows(view, names, columns, size=(9.2, 0.3 * len(names) + 1.3))
    for axes, rows in zip(figure.axes, columns.values(), strict=True):
        for place, name in enumerate(names):
            if name in view.significant(rows):
                _star(axes, rows[name]["mean"], place)
        axes.axvline(0, color="black", linewidth=1)
    figure.suptitle(title)
    return figure


def _interval_rows(
    view: ResultsView, names: Sequence[str], columns: Mapping[str, Mapping[str, Row]], size: tuple[float, float]
) -> Figure:
    """A row for each variant, from the bottom up: a dot with its interval, the policy before training a dashed line."""
    looks = styles_of(view.results)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, (xlabel, rows) in zip(grid, columns.items(), strict=True):
        for place, name in enumerate(names):
            if name in rows:
                bounds = np.array([rows[name]["low"], rows[name]["high"]], dtype=float)
                axes.plot(bounds, [place, place], color=looks[name].color, linewidth=2)
                axes.plot(rows[name]["mean"], place, "o", color=looks[name].color, ms=6)
        axes.set_yticks(range(len(names)), [view.label(name) for name in names], fontsize=9)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        style.grid_lines(axes, "x")
        if START in rows:
            axes.axvline(rows[START]["mean"], color=looks[START].color, linestyle=looks[START].line, linewidth=1.4)
        axes.set_xlabel(xlabel)
    return figure


def _star(axes: Axes, x: float, y: float) -> None:
    axes.annotate("*", (x, y), xytext=(0, 2), textcoords="offset points", fontsize=14, ha="center")
