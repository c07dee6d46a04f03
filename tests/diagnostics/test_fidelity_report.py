"""Plots of the sweeps, and how figures are shown in tables."""

import math

import pytest

from tealightning.diagnostics.fidelity_report import measured
from tealightning.diagnostics.measurements import measure, measurements_of, parse_estimators, takes_part
from tealightning.diagnostics.plots import PLOTS, plot_sweep


def test_sweeps_draw_their_plots(tmp_path):
    specs = parse_estimators(["grpo", "direct", "tea:alpha=0.5", "max_at_k"])
    for sweep, names in PLOTS.items():
        settings = [each for each in measurements_of(sweep, ["gaussian"], [16], [64], [0.25]) if each.m <= 64]
        rows = measure(settings, specs, groups=512, seed=0)
        taking_part = {spec.label for spec in specs if takes_part(spec, sweep)}
        assert {row["estimator"] for row in rows} == taking_part
        files = plot_sweep(sweep, rows, tmp_path)
        assert tuple(file.name for file in files) == tuple(names)
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert not takes_part(specs[0], "alpha")
    assert not takes_part(specs[2], "alpha")
    assert takes_part(specs[2], "tail")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (-0.3437, 0.0056, "-0.344 ± 0.006"),
        (25.91, 1.4, "26 ± 1"),
        (0.99912, 0.00003, "0.99912 ± 0.00003"),
        (1.0, 0.0, "1.000"),
        (math.nan, 0.1, "-"),
    ],
)
def test_figures_are_shown_with_as_many_digits_as_they_have(value, error, shown):
    assert measured({"x": value, "x_se": error}, "x") == shown
    assert measured({}, "x") == "-"
