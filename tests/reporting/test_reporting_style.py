"""Styles tell names apart without colour, facets share scales, and images are reproducible."""

import io

import numpy as np
import pytest
from PIL import Image

from tealightning.reporting.style import Curve, draw, facets, image, log_n_axis, styles


def test_styles_differ_in_marker_or_line_for_30_names():
    looks = styles([f"name{i}" for i in range(30)], reference="name3")
    assert looks["name3"].color == "#000000"
    assert len({(str(look.line), look.marker) for look in looks.values()}) == 30
    assert len({(str(look.line), look.color) for look in looks.values()}) == 30


def test_facets_hide_unused_panels_and_label_the_lowest_of_each_column():
    figure, grid = facets(5)
    assert len(grid) == 5 and sum(axes.get_visible() for axes in figure.axes) == 5
    grid[0].plot([0, 4], [0, 1])
    assert grid[4].get_xlim() == grid[0].get_xlim()


def test_draw_makes_a_line_and_its_band():
    _, (axes,) = facets(1)
    draw(axes, Curve(x=[1, 2], mean=[0, 1], low=[-1, 0], high=[1, float("nan")]), styles("a")["a"], "a")
    np.testing.assert_array_equal(axes.get_lines()[0].get_xydata(), [[1, 0], [2, 1]])
    assert len(axes.collections) == 1
    log_n_axis(axes, [1, 2, 64])
    assert axes.get_xticks().tolist() == [1, 2, 64]


def test_image_is_the_same_for_the_same_figure():
    figure, _ = facets(1)
    svg = image(figure, "svg")
    assert svg == image(figure, "svg") and b"<dc:date>" not in svg
    png = Image.open(io.BytesIO(image(figure, "png")))
    assert png.size == pytest.approx(150 * figure.get_size_inches(), abs=1)
