"""Line plots of an ablation: over n, over KL and over training."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tealightning.ablation.plot_style import (
    OVERLAID,
    Curve,
    bottom,
    curve,
    legend_outside,
    log_n_axis,
    number,
    overlay,
    panels,
)
from tealightning.ablation.results_view import START, Results, at, budgets_of, evaluated, is_significant, label

TRAINING_METRICS = {
    "reward_mean": "mean reward of the rollouts",
    "reward_std": "reward spread within a prompt",
    "completion_length": "completion length, tokens",
    "entropy": "entropy, nats a token",
    "kl_per_token": "KL, nats a token",
    "grad_norm": "gradient norm",
    "rollouts_skipped": "rollouts without gradient, fraction",
}


def over_n(results: Results, split: str, quantity: str) -> dict[str, Curve]:
    """A curve over n for every policy that has `quantity`."""
    policies = evaluated(results, split, start=True).items()
    return {
        name: curve(points, [point["n"] for point in points])
        for name, policy in policies
        if (points := policy.get(quantity))
    }


def plot_over_n(results: Results, split: str, quantity: str, title: str) -> Figure:
    """`best_of_n` or `gold_best_of_n` of all policies on one pair of axes."""
    curves = over_n(results, split, quantity)
    figure = Figure(figsize=(9.2, max(4.4, 0.19 * min(len(curves), 20) + 0.8)), layout="constrained")
    axes = figure.subplots()
    overlay(axes, results, curves)
    log_n_axis(axes, budgets_of(results, split, quantity))
    axes.set(xlabel="n, samples of which the best is kept", ylabel="reward", title=title)
    legend_outside(figure, axes)
    return figure


def plot_over_n_panels(results: Results, split: str, quantity: str, title: str) -> Figure:
    """The same with a panel and a band for each variant, beside the reference and the policy before training."""
    curves = over_n(results, split, quantity)
    context = [name for name in (START, results["reference"]) if name in curves and len(curves) > 2]
    figure, grid = panels(results, curves, context)
    log_n_axis(grid[0], budgets_of(results, split, quantity))
    finish_panels(figure, grid, title, "n", "reward")
    return figure


def plot_differences(results: Results, split: str) -> Figure:
    """Differences to the reference over n, a panel for each variant; a star where the headline one is significant."""
    curves, n = over_n(results, split, "against_reference"), results["headline_n"]
    figure, grid = panels(results, curves)
    for axes, name in zip(grid, curves, strict=True):
        axes.axhline(0, color="black", linewidth=1)
        found = at(evaluated(results, split)[name]["against_reference"], n)
        if found is not None and is_significant(results, found):
            axes.annotate(
                "*", (n, number(found["mean"])), xytext=(0, 4), textcoords="offset points", fontsize=16, ha="center"
            )
    log_n_axis(grid[0], budgets_of(results, split, "against_reference"))
    title = f"Best-of-n, difference to {label(results, results['reference'])}"
    finish_panels(figure, grid, title, "n", "difference", legend=False)
    return figure


def over_kl(results: Results, n: int, quantity: str = "best_of_n") -> dict[str, Curve]:
    """Reward against KL to the start over the evaluations of training, where at least two of them know both."""
    curves = {}
    for name in results["variants"]:
        checkpoints = (results.get("checkpoints") or {}).get(name) or ()
        pairs = [(point["kl"], at(point.get(quantity), n)) for point in checkpoints]
        known = [(kl["mean"], found) for kl, found in pairs if kl and found]
        if len(known) > 1:
            curves[name] = curve([found for _, found in known], [kl for kl, _ in known])
    return curves


def plot_over_kl(results: Results, parts: Sequence[tuple[str, int, str]], title: str) -> Figure:
    """Reward against KL side by side for each (quantity, n, name) of `parts`."""
    figure = Figure(figsize=(10, 5.2 + 0.06 * len(results["variants"])), layout="constrained")
    grid = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (quantity, n, name) in zip(grid, parts, strict=True):
        overlay(axes, results, over_kl(results, n, quantity))
        axes.set(xlabel="KL to the start, nats a completion", ylabel=name)
    figure.suptitle(title)
    legend_outside(figure, grid[0], below=True)
    return figure


def plot_over_kl_panels(results: Results, n: int) -> Figure:
    """Best-of-n against KL, a panel and a band for each variant."""
    return beside_reference(results, over_kl(results, n), f"Best-of-{n} against KL", "KL, nats a completion", "reward")


def training_metrics(results: Results) -> list[str]:
    """The metrics that some variant logged, the known ones first."""
    series = (results.get("training") or {}).values()
    found = list(dict.fromkeys(key for one in series for key in one if key != "step"))
    return [key for key in TRAINING_METRICS if key in found] + [key for key in found if key not in TRAINING_METRICS]


def over_steps(results: Results, metric: str) -> dict[str, Curve]:
    """A training metric over steps for every variant that logged it."""
    curves = {}
    for name in results["variants"]:
        series: Mapping[str, Any] = (results.get("training") or {}).get(name) or {}
        if metric in series:
            values = {key: [number(value) for value in series[metric][key]] for key in ("mean", "low", "high")}
            curves[name] = Curve(x=[float(step) for step in series["step"]], **values)
    return curves


def plot_training(results: Results) -> Figure:
    """Every training metric over steps, all variants overlaid."""
    metrics = training_metrics(results)
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)
    legend = 0.25 * (len(results["variants"]) // 3 + 1)
    figure = Figure(figsize=(10, 3.3 * rows + legend), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        overlay(axes, results, over_steps(results, metric))
        axes.set(xlabel="step", ylabel=TRAINING_METRICS.get(metric, metric.replace("_", " ")))
    for unused in grid[len(metrics) :]:
        unused.set_visible(False)
    legend_outside(figure, grid[0], below=True)
    return figure


def plot_training_panels(results: Results, metric: str) -> Figure:
    """One training metric with a panel and a band for each variant, beside the reference."""
    title = f"Training: {TRAINING_METRICS.get(metric, metric)}"
    return beside_reference(results, over_steps(results, metric), title, "step", "")


def beside_reference(results: Results, curves: dict[str, Curve], title: str, xlabel: str, ylabel: str) -> Figure:
    """A panel for each curve, with the reference's in all of them."""
    context = [results["reference"]] if results["reference"] in curves and len(curves) > 1 else []
    figure, grid = panels(results, curves, context)
    finish_panels(figure, grid, title, xlabel, ylabel)
    return figure


def finish_panels(
    figure: Figure, grid: Sequence[Any], title: str, xlabel: str, ylabel: str, *, legend: bool = True
) -> None:
    figure.suptitle(title)
    for axes in bottom(grid):
        axes.set_xlabel(xlabel)  # not the figure's: that would lie over the legend
    figure.supylabel(ylabel, fontsize=10)
    if legend:
        lines = [line for line in grid[0].get_lines() if not line.get_label().startswith("_")]
        context = [line for line in lines if line.get_label() != "this variant"]
        if context:
            figure.legend(handles=context, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def needs_panels(results: Results) -> bool:
    """True if bands had to be left out of the overlaid plots."""
    return len(results["variants"]) > OVERLAID
