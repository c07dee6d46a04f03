"""Plots of an ablation with their captions: over n, over KL, over training, differences, completions, rewards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tealightning.ablation.results_view import (
    DIAGNOSTICS,
    START,
    Estimate,
    Results,
    at,
    at_n,
    evaluated,
    interval_name,
    is_significant,
    label,
    main_split,
    split_name,
)
from tealightning.reporting.page import Plot
from tealightning.reporting.style import (
    CONTEXT,
    Curve,
    Style,
    bottom,
    draw,
    facets,
    grid_lines,
    legend_outside,
    log_n_axis,
    panel_title,
    styles,
)

OVERLAID = 7
"""Bands of more curves on one pair of axes hide each other: beyond, there are lines without bands."""

CROWD = 15
"""More curves than this say nothing as grey lines in every panel, and make files of megabytes."""

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


def all_plots(results: Results) -> list[Plot]:
    """Every plot that the results have the numbers for; names are unique."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a label is one
        plots = [plot for split in results.get("splits") or {} for plot in _split_plots(results, split)]
        return [*plots, *_kl_plots(results), *_training_plots(results)]


def styles_of(results: Results) -> dict[str, Style]:
    """A style for every variant: the reference black, the policy before training grey and dashed."""
    start = Style(color="#7F7F7F", marker="", line=(0, (4, 2)))
    return styles(results["variants"], results["reference"]) | {START: start}


def _split_plots(results: Results, split: str) -> Iterator[Plot]:
    """Plots of one prompt set; those of sets after the main one are fewer, and named after it."""
    is_main = split == main_split(results)
    suffix, where, interval = "" if is_main else f"_{split}", split_name(split), interval_name(results)
    for quantity, what in {"best_of_n": "Best-of-n", "gold_best_of_n": "Gold reward of the best of n"}.items():
        curves = over_n(results, split, quantity)
        if curves.keys() - {START}:
            bands = f"bands: {interval} intervals" if len(curves) <= OVERLAID else "intervals are in the table"
            yield Plot(
                name=f"{quantity}{suffix}",
                figure=_plot_over_n(results, curves, f"{what}, {where}"),
                caption=f"{what} on the {where}; {bands}.",
                alt=f"{what} against n for every variant and the policy before training, {where}.",
            )
    reference = label(results, results["reference"])
    others = {"reference": reference, "start": "the policy before training"}
    for key, other in others.items():
        if at_n(results, split, f"against_{key}"):
            yield Plot(
                name=f"difference_to_{key}{suffix}",
                figure=_plot_forest(results, split, f"against_{key}", f"Difference to {other}, {where}"),
                caption=f"Paired differences to {other} on the {where}, {interval} intervals, ordered by the left "
                "panel. A star: significant after correction.",
                alt=f"Forest plot of every variant's difference to {other}, {where}.",
            )
    if is_main and (curves := over_n(results, split, "against_reference")):
        yield Plot(
            name="difference_to_reference_over_n",
            figure=_plot_differences(results, split, curves),
            caption=f"Difference to {reference} over n on the {where}, {interval} bands. A star: significant at "
            f"n = {results['headline_n']} after correction.",
            alt=f"Difference in best-of-n to {reference} against n, a panel for each variant, {where}.",
        )
    if is_main and any(_diagnostic(p, key) for p in evaluated(results, split).values() for key in BARS):
        yield Plot(
            name="completions",
            figure=_plot_completions(results, split),
            caption=f"Completions on the {where}, {interval} intervals. Dashed: before training. High "
            "self-similarity and low distinct-2 mean that samples of a prompt repeat each other.",
            alt=f"Length, distinct-2, self-similarity and reward spread of every variant's completions, {where}.",
        )


def _kl_plots(results: Results) -> Iterator[Plot]:
    """Reward against the distance from the start, over the evaluations of training."""
    n = results["headline_n"]
    bands = f" Bands: {interval_name(results)} intervals." if len(results["variants"]) <= OVERLAID else ""
    if over_kl(results, n):
        parts = [("best_of_n", n, f"best-of-{n}")]
        parts += [("best_of_n", 1, "mean reward (n = 1)")] if n != 1 and over_kl(results, 1) else []
        yield Plot(
            name="best_of_n_against_kl",
            figure=_plot_over_kl(results, parts, "Reward against KL to the start"),
            caption="Every evaluation of training, from the start (KL 0) to the final policy: the curve on top gets "
            f"more reward for the same distance.{bands}",
            alt=f"Best-of-{n} and mean reward against KL to the start for every variant.",
        )
    if over_kl(results, n, "gold_best_of_n"):
        parts = [("best_of_n", n, f"training reward, best-of-{n}"), ("gold_best_of_n", n, f"gold reward, best-of-{n}")]
        yield Plot(
            name="gold_against_kl",
            figure=_plot_over_kl(results, parts, "Training reward and gold reward against KL"),
            caption="Where the left curves go on rising and the right ones fall, the training reward is "
            f"over-optimised.{bands}",
            alt=f"Best-of-{n} by the training reward and by the gold reward against KL for every variant.",
        )


def _training_plots(results: Results) -> Iterator[Plot]:
    if metrics := training_metrics(results):
        bands = " with bands over seeds" if len(results["variants"]) <= OVERLAID else ""
        yield Plot(
            name="training",
            figure=_plot_training(results, metrics),
            caption=f"Training, means over seeds{bands}.",
            alt=f"Training curves of every variant: {', '.join(metrics)}.",
        )
    if set((results.get("histograms") or {}).get("variants") or ()) & {*results["variants"]}:
        yield Plot(
            name="reward_histograms",
            figure=_plot_histograms(results),
            caption="Rewards of single samples before training (grey) and after.",
            alt="Histograms of rewards before and after training, a panel for each variant.",
        )


# Curves: the numbers of a plot


def curve(points: Sequence[Mapping[str, Any] | None], xs: Sequence[float]) -> Curve:
    """Estimates over `xs`; None estimates and null bounds become NaN."""
    columns = {key: [_number((point or {}).get(key)) for point in points] for key in ("mean", "low", "high")}
    return Curve(x=[float(x) for x in xs], **columns)


def over_n(results: Results, split: str, quantity: str) -> dict[str, Curve]:
    """A curve over n for every policy that has `quantity`."""
    policies = evaluated(results, split, start=True).items()
    return {n: curve(points, [point["n"] for point in points]) for n, p in policies if (points := p.get(quantity))}


def over_kl(results: Results, n: int, quantity: str = "best_of_n") -> dict[str, Curve]:
    """Reward against KL to the start over the evaluations of training, where at least two of them know both."""
    curves = {}
    for name in results["variants"]:
        checkpoints = (results.get("checkpoints") or {}).get(name) or ()
        pairs = [(point["kl"], at(point.get(quantity), n)) for point in checkpoints]
        known = [(kl["mean"], value) for kl, value in pairs if kl and value]
        if len(known) > 1:
            curves[name] = curve([value for _, value in known], [kl for kl, _ in known])
    return curves


def over_steps(results: Results, metric: str) -> dict[str, Curve]:
    """A training metric over steps for every variant that logged it."""
    training = results.get("training") or {}
    logged = {name: series for name in results["variants"] if metric in (series := training.get(name) or {})}
    return {
        name: Curve(
            x=[float(step) for step in series["step"]],
            **{key: [_number(value) for value in series[metric][key]] for key in ("mean", "low", "high")},
        )
        for name, series in logged.items()
    }


def training_metrics(results: Results) -> list[str]:
    """The metrics that some variant logged, the known ones first."""
    logged = dict.fromkeys(key for one in (results.get("training") or {}).values() for key in one if key != "step")
    return [key for key in TRAINING_METRICS if key in logged] + [key for key in logged if key not in TRAINING_METRICS]


def _diagnostic(policy: Mapping[str, Any], key: str) -> Estimate | None:
    estimate = (policy.get("diagnostics") or {}).get(key)
    return estimate if estimate and estimate["mean"] is not None else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# Figures


def _overlay(axes: Axes, results: Results, curves: Mapping[str, Curve]) -> None:
    """All curves on one pair of axes, with bands if there are few."""
    for name, line in curves.items():
        draw(axes, line, styles_of(results)[name], label(results, name), band=len(curves) <= OVERLAID)


def _plot_over_n(results: Results, curves: Mapping[str, Curve], title: str) -> Figure:
    """All policies on one pair of axes."""
    figure = Figure(figsize=(9.2, max(4.4, 0.19 * min(len(curves), 20) + 0.8)), layout="constrained")
    axes = figure.subplots()
    _overlay(axes, results, curves)
    log_n_axis(axes, results["ns"])
    axes.set(xlabel="n, samples of which the best is kept", ylabel="reward", title=title)
    legend_outside(figure, axes)
    return figure


def _plot_over_kl(results: Results, parts: Sequence[tuple[str, int, str]], title: str) -> Figure:
    """Reward against KL side by side for each (quantity, n, name) of `parts`."""
    height = 4.4 + 0.06 * len(results["variants"])
    figure, grid = facets(len(parts), size=(9.4 / len(parts), height), share=False)
    for axes, (quantity, n, name) in zip(grid, parts, strict=True):
        _overlay(axes, results, over_kl(results, n, quantity))
        axes.set(xlabel="KL to the start, nats a completion", ylabel=name)
    figure.suptitle(title)
    legend_outside(figure, grid[0], below=True)
    return figure


def _plot_training(results: Results, metrics: Sequence[str]) -> Figure:
    """Every training metric over steps, all variants overlaid."""
    figure, grid = facets(len(metrics), columns=2, size=(4.7, 3.3), share=False)
    for axes, metric in zip(grid, metrics, strict=True):
        _overlay(axes, results, over_steps(results, metric))
        axes.set(xlabel="step", ylabel=TRAINING_METRICS.get(metric, metric.replace("_", " ")))
    legend_outside(figure, grid[0], below=True)
    return figure


def _plot_differences(results: Results, split: str, curves: Mapping[str, Curve]) -> Figure:
    """Differences to the reference over n, a panel for each variant, the others grey behind it."""
    figure, grid = facets(len(curves))
    headline = at_n(results, split, "against_reference")
    for axes, name in zip(grid, curves, strict=True):
        for other in curves.values() if len(curves) <= CROWD else ():
            axes.plot(other.x, other.mean, color=CONTEXT, linewidth=0.7, zorder=0)
        draw(axes, curves[name], styles_of(results)[name], label(results, name))
        axes.axhline(0, color="black", linewidth=1)
        panel_title(axes, label(results, name))
        if is_significant(results, headline.get(name)):
            _star(axes, results["headline_n"], headline[name]["mean"])
    log_n_axis(grid[0], results["ns"])
    for axes in bottom(grid):
        axes.set_xlabel("n")
    figure.suptitle(f"Best-of-n, difference to {label(results, results['reference'])}")
    figure.supylabel("difference", fontsize=10)
    return figure


def _plot_histograms(results: Results) -> Figure:
    """The rewards of every variant after training, over those before it."""
    histograms = results["histograms"]
    shown = [name for name in results["variants"] if name in histograms["variants"]]
    figure, grid = facets(len(shown))
    for axes, name in zip(grid, shown, strict=True):
        axes.stairs(histograms["start"], histograms["edges"], fill=True, color="#D5D5D5")
        color = styles_of(results)[name].color
        axes.stairs(histograms["variants"][name], histograms["edges"], color=color, linewidth=1.6)
        panel_title(axes, label(results, name))
    figure.suptitle("Rewards before training (grey) and after")
    figure.supxlabel("reward", fontsize=10)
    figure.supylabel("density", fontsize=10)
    return figure


def _plot_forest(results: Results, split: str, against: str, title: str) -> Figure:
    """Differences at the headline n and at n = 1, a row for each variant, the highest at the headline n on top."""
    headline = results["headline_n"]
    columns = {n: at_n(results, split, against, n) for n in (headline, 1)}
    names = sorted(columns[headline], key=lambda name: columns[headline][name]["mean"])
    columns = {n: rows for n, rows in columns.items() if rows.keys() >= {*names}}
    figure = Figure(figsize=(9.2, 0.3 * len(names) + 1.3), layout="constrained")
    grid = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, (n, rows) in zip(grid, columns.items(), strict=True):
        _interval_rows(axes, results, names, [rows[name] for name in names])
        for row, name in enumerate(names):
            if is_significant(results, rows[name]):
                _star(axes, rows[name]["mean"], row)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(xlabel="mean reward (n = 1)" if n == 1 else f"best-of-{n}")
    figure.suptitle(title)
    return figure


def _plot_completions(results: Results, split: str) -> Figure:
    """Length, diversity and spread of every policy with intervals; the dashed line is the policy before training."""
    policies = evaluated(results, split, start=True)
    names = [name for name in policies if name != START][::-1]
    figure = Figure(figsize=(10, 0.25 * len(names) + 1.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(BARS), sharey=True), BARS, strict=True):
        _interval_rows(axes, results, names, [_diagnostic(policies[name], key) for name in names])
        if START in policies and (start := _diagnostic(policies[START], key)):
            look = styles_of(results)[START]
            axes.axvline(start["mean"], color=look.color, linestyle=look.line, linewidth=1.4)
        axes.set(xlabel=DIAGNOSTICS[key])
    return figure


def _interval_rows(axes: Axes, results: Results, names: Sequence[str], points: Sequence[Estimate | None]) -> None:
    """A row for each variant, from the bottom up: a dot with its interval."""
    for row, (name, point) in enumerate(zip(names, points, strict=True)):
        if point is not None:
            color = styles_of(results)[name].color
            axes.plot([_number(point["low"]), _number(point["high"])], [row, row], color=color, linewidth=2)
            axes.plot(point["mean"], row, "o", color=color, ms=6)
    axes.set_yticks(range(len(names)), [label(results, name) for name in names], fontsize=9)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    grid_lines(axes, "x")


def _star(axes: Axes, x: float, y: float) -> None:
    axes.annotate("*", (x, y), xytext=(0, 2), textcoords="offset points", fontsize=14, ha="center")
