"""The look of plots: one style per name, curves with bands, facets, axes over n, image files.

Figures are made without pyplot, so that no global backend is touched.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")  # Okabe-Ito, brown for yellow
MARKERS = "sD^vPX*<>phd8"  # the circle is the reference's
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
CONTEXT = "#C8C8C8"


@dataclass(kw_only=True, slots=True, frozen=True)
class Style:
    """Colour, marker and line of a name, the same in every plot."""

    color: str
    marker: str
    line: Any
    width: float = 1.6

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "linewidth": self.width, "ms": 4.5}


REFERENCE = Style(color="#000000", marker="o", line="-", width=2.2)


@dataclass(kw_only=True, slots=True, frozen=True)
class Curve:
    """A line with its band: numbers of equal length, NaN where something is not known."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def styles(names: Iterable[str], reference: str | None = None) -> dict[str, Style]:
    """A style for every name: the reference black, the others by colour, line and marker, so that no two look alike
    without colour either."""
    looks = {}
    for index, name in enumerate(name for name in names if name != reference):
        line = LINES[index // len(COLORS) % len(LINES)]
        looks[name] = Style(color=COLORS[index % len(COLORS)], line=line, marker=MARKERS[index % len(MARKERS)])
    return looks if reference is None else looks | {reference: REFERENCE}


def draw(axes: Axes, curve: Curve, style: Style, label: str, *, band: bool = True) -> None:
    """One curve, and its band in the same colour."""
    axes.plot(curve.x, curve.mean, label=label, **style.options | ({"marker": ""} if len(curve.x) > 15 else {}))
    if band:
        axes.fill_between(curve.x, curve.low, curve.high, color=style.color, alpha=0.15, linewidth=0)
    grid_lines(axes)


def grid_lines(axes: Axes, axis: Any = "both") -> None:
    """Faint grid lines."""
    axes.grid(axis=axis, alpha=0.25, linewidth=0.6)


def facets(
    count: int, *, columns: int | None = None, size: tuple[float, float] = (3.3, 2.2), share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of a size in inches, at most 10 inches wide; `share`: all have the same scales."""
    columns = min(count, columns or (3 if count <= 9 else 4 if count <= 16 else 5))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(min(10.0, size[0] * columns + 0.6), size[1] * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).ravel().tolist()
    for unused in grid[count:]:
        unused.set_visible(False)
    for axes in bottom(grid[:count]):
        axes.xaxis.set_tick_params(labelbottom=True)  # below it may be an unused one, which has the labels otherwise
    return figure, grid[:count]


def bottom(grid: Sequence[Axes]) -> list[Axes]:
    """The lowest axes of every column."""
    return list({spec.colspan.start: axes for axes in grid if (spec := axes.get_subplotspec()) is not None}.values())


def panel_title(axes: Axes, text: str) -> None:
    """A small title, wrapped to the width of a panel."""
    axes.set_title("\n".join(textwrap.wrap(text, 28)), fontsize=9)


def log_n_axis(axes: Axes, ns: Sequence[int]) -> None:
    """n on a log axis of base 2 with a tick at every n, named where there is room for it."""
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
    if below:
        figure.legend(handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=min(len(names), 3))
    else:
        columns = 1 if len(names) <= 20 else 2
        figure.legend(handles, names, fontsize=8, frameon=False, loc="outside right upper", ncols=columns)


def image(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "tealightning"}):
        figure.savefig(stream, format=kind, dpi=150, facecolor="white", metadata=metadata)
    return stream.getvalue()
