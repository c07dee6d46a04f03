"""Shared plot style of an ablation: one look per variant, axes of overlaid lines and of small panels."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global backend is touched

from tealightning.ablation.results_view import START, Results, label

OVERLAID = 6
"""Bands of more variants on one pair of axes hide each other: beyond, lines stay and bands move to panels."""

CROWD = 15
"""More curves than this say nothing as grey lines in every panel, and make files of megabytes."""

COLORS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C564B",
)  # Okabe-Ito, and brown for yellow
MARKERS = "sD^vPX*<>phd8"  # the circle is the reference's
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
CONTEXT = "#C8C8C8"


@dataclass(kw_only=True, slots=True, frozen=True)
class Style:
    """Colour, marker and line of a policy, the same in every plot."""

    color: str
    marker: str
    line: Any
    width: float = 1.6

    def line_options(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "linewidth": self.width, "ms": 4.5}


@dataclass(kw_only=True, slots=True, frozen=True)
class Curve:
    """A line with its band: numbers of equal length, NaN where something is not known."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def styles(results: Results) -> dict[str, Style]:
    """A look for every variant: the reference black, the policy before training grey, the others by colour, line and
    marker, so that no two look alike without colour either."""
    others = [name for name in results["variants"] if name != results["reference"]]
    looks = {
        name: Style(
            color=COLORS[index % len(COLORS)],
            line=LINES[index // len(COLORS) % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
        )
        for index, name in enumerate(others)
    }
    looks[START] = Style(color="#7F7F7F", marker="", line=(0, (4, 2)))
    looks[results["reference"]] = Style(color="#000000", marker="o", line="-", width=2.2)
    return looks


def curve(points: Sequence[Mapping[str, Any] | None], xs: Sequence[float]) -> Curve:
    """Estimates over `xs`; None estimates and null bounds become NaN."""
    columns = {key: [number((point or {}).get(key)) for point in points] for key in ("mean", "low", "high")}
    return Curve(x=[float(x) for x in xs], **columns)


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def draw(axes: Axes, line: Curve, style: Style, name: str, *, band: bool) -> None:
    """One curve, and its band in the same colour."""
    options = style.line_options() | ({"marker": ""} if len(line.x) > 15 else {})
    axes.plot(line.x, line.mean, label=name, **options)
    if band:
        axes.fill_between(line.x, line.low, line.high, color=style.color, alpha=0.15, linewidth=0)


def overlay(axes: Axes, results: Results, curves: Mapping[str, Curve]) -> None:
    """All curves on one pair of axes, with bands if there are few."""
    looks = styles(results)
    for name, line in curves.items():
        draw(axes, line, looks[name], label(results, name), band=len(curves) <= OVERLAID + 1)
    axes.grid(alpha=0.25, linewidth=0.6)


def panels(results: Results, curves: Mapping[str, Curve], context: Sequence[str] = ()) -> tuple[Figure, list[Axes]]:
    """A small panel with its band for each curve; the others are thin grey lines in it, `context` keeps its look.

    Returns:
        The figure, and the axes in the order of the curves without `context`.
    """
    looks = styles(results)
    shown = [name for name in curves if name not in context]
    figure, grid = panel_grid(len(shown))
    for axes, name in zip(grid, shown, strict=True):
        for other, line in curves.items():
            if other in context:
                draw(axes, line, looks[other], label(results, other), band=False)
            elif other != name and len(curves) <= CROWD:
                axes.plot(line.x, line.mean, color=CONTEXT, linewidth=0.7, zorder=0)
        draw(axes, curves[name], looks[name], "this variant", band=True)
        panel_title(axes, label(results, name))
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, grid


def panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    """`count` small axes that share both scales."""
    columns = min(count, 3 if count <= 9 else 4 if count <= 16 else 5)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(min(10.0, 3.3 * columns + 0.6), 2.2 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    for unused in grid[count:]:
        unused.set_visible(False)
    for lowest in bottom(grid[:count]):
        lowest.xaxis.set_tick_params(labelbottom=True)  # below it may be an unused one, which has the labels otherwise
    return figure, grid[:count]


def bottom(grid: Sequence[Axes]) -> list[Axes]:
    """The lowest axes of every column."""
    lowest = {spec.colspan.start: axes for axes in grid if (spec := axes.get_subplotspec()) is not None}
    return list(lowest.values())


def panel_title(axes: Axes, text: str) -> None:
    axes.set_title("\n".join(textwrap.wrap(text, 28)), fontsize=9)


def log_n_axis(axes: Axes, ns: Sequence[int]) -> None:
    """n on a log axis of base 2 with a tick at every budget, named where there is room for it."""
    axes.set_xscale("log", base=2)
    named, octaves = [ns[-1]], math.log2(ns[-1] / ns[0])
    for n in reversed(ns):
        if math.log2(named[-1] / n) > octaves / 6:
            named.append(n)
    axes.set_xticks(ns, [str(n) if n in named else "" for n in ns])
    axes.minorticks_off()


def legend_outside(figure: Figure, axes: Axes, *, below: bool = False) -> None:
    """One legend for the figure, where it covers no line."""
    handles, names = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"fontsize": 8, "frameon": False}
    if below:
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), **look)
    else:
        figure.legend(handles, names, loc="outside right upper", ncols=1 if len(names) <= 20 else 2, **look)
