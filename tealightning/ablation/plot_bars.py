"""Forest plots, completion plots and histograms of an ablation: a row or a panel per variant."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tealightning.ablation.plot_style import number, panel_grid, panel_title, styles
from tealightning.ablation.results_view import (
    DIAGNOSTICS,
    START,
    Estimate,
    Results,
    at,
    evaluated,
    is_significant,
    label,
)

BARS = ("completion_length", "distinct_2", "self_similarity", "reward_std")


def plot_forest(results: Results, split: str, against: str, title: str) -> Figure:
    """Differences at the headline n and at n = 1, a row for each variant, the highest at the headline n on top."""
    headline = results["headline_n"]
    found = {name: policy[against] for name, policy in evaluated(results, split).items() if policy.get(against)}
    names = sorted(found, key=lambda name: number((at(found[name], headline) or {}).get("mean")))
    ns = [n for n in dict.fromkeys([headline, 1]) if all(at(found[name], n) for name in names)]
    figure = Figure(figsize=(9.2, 0.3 * len(names) + 1.3), layout="constrained")
    grid = figure.subplots(1, len(ns), squeeze=False, sharey=True)[0]
    for axes, n in zip(grid, ns, strict=True):
        for row, name in enumerate(names):
            point = at(found[name], n)
            assert point is not None
            interval_row(axes, row, point, styles(results)[name].color)
            if is_significant(results, point):
                axes.annotate(
                    "*",
                    (number(point["mean"]), row),
                    xytext=(0, 1),
                    textcoords="offset points",
                    fontsize=13,
                    ha="center",
                )
        axes.axvline(0, color="black", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="mean reward (n = 1)" if n == 1 else f"best-of-{n}")
    name_rows(grid[0], [label(results, name) for name in names])
    figure.suptitle(title)
    return figure


def interval_row(axes: Axes, row: int, point: Estimate, color: str) -> None:
    """A dot with its interval."""
    axes.plot([number(point["low"]), number(point["high"])], [row, row], color=color, linewidth=2)
    axes.plot(number(point["mean"]), row, "o", color=color, ms=6)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)


def name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(-0.7, len(names) - 0.3)


def plot_completions(results: Results, split: str) -> Figure:
    """Length, diversity and spread of every policy with intervals; the dashed line is the policy before training."""
    policies = evaluated(results, split, start=True)
    names = [name for name in policies if name != START][::-1]
    figure = Figure(figsize=(10, 0.25 * len(names) + 1.2), layout="constrained")
    grid = figure.subplots(1, len(BARS), sharey=True)
    for axes, key in zip(grid, BARS, strict=True):
        for row, name in enumerate(names):
            if point := diagnostic(policies[name], key):
                interval_row(axes, row, point, styles(results)[name].color)
        if START in policies and (start := diagnostic(policies[START], key)):
            look = styles(results)[START]
            axes.axvline(start["mean"], color=look.color, linestyle=look.line, linewidth=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set(xlabel=DIAGNOSTICS[key])
    name_rows(grid[0], [label(results, name) for name in names])
    return figure


def diagnostic(policy: Mapping[str, Any], key: str) -> Estimate | None:
    found = (policy.get("diagnostics") or {}).get(key)
    return found if found and found["mean"] is not None else None


def plot_histograms(results: Results) -> Figure:
    """The rewards of every variant after training, over those before it."""
    histograms = results["histograms"]
    shown = [name for name in results["variants"] if name in histograms["variants"]]
    figure, grid = panel_grid(len(shown))
    for axes, name in zip(grid, shown, strict=True):
        axes.stairs(histograms["start"], histograms["edges"], fill=True, color="#D5D5D5", label=label(results, START))
        axes.stairs(
            histograms["variants"][name],
            histograms["edges"],
            color=styles(results)[name].color,
            linewidth=1.6,
            label="after",
        )
        panel_title(axes, label(results, name))
    figure.suptitle("Rewards before training (grey) and after")
    figure.supxlabel("reward", fontsize=10)
    figure.supylabel("density", fontsize=10)
    return figure
