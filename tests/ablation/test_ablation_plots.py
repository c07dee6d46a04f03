"""What the plots draw: every variant, told apart without colour too, with the numbers of results.json."""

import numpy as np
import pytest
from ablation_results import NS, results_of

from tealightning.ablation.plots import all_plots, over_kl, styles_of
from tealightning.ablation.tables import ResultsView
from tealightning.reporting.style import image


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def plots(results):
    return {plot.name: plot for plot in all_plots(results)}


def test_styles_differ_in_marker_or_line_for_30_variants():
    looks = styles_of(results_of(variants=30, splits=(), leave_out=("checkpoints", "training")))
    assert len({(str(look.line), look.marker) for look in looks.values()}) == 31  # and the policy before training
    assert len({(str(look.line), look.color) for look in looks.values()}) == 31


def test_plots_have_unique_names_captions_and_alternative_texts(plots):
    assert set(plots) == {
        "best_of_n", "gold_best_of_n", "difference_to_reference", "difference_to_reference_over_n",
        "difference_to_start", "completions", "best_of_n_test", "gold_best_of_n_test", "difference_to_reference_test",
        "difference_to_start_test", "best_of_n_against_kl", "gold_against_kl", "training", "reward_histograms",
    }  # fmt: skip
    assert all(plot.caption.endswith(".") and plot.alt.endswith(".") for plot in plots.values())


def test_best_of_n_draws_every_policy_with_its_band_on_a_log_axis(results, plots):
    (axes,) = plots["best_of_n"].figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert len(lines) == len(axes.collections) == 7
    grpo = results["splits"]["val"]["variants"]["grpo"]["best_of_n"]
    np.testing.assert_array_equal(lines["grpo"].get_xydata(), [[point["n"], point["mean"]] for point in grpo])
    assert axes.get_xscale() == "log"
    assert axes.get_xticks().tolist() == NS


def test_band_spans_the_interval(results, plots):
    (axes,) = plots["best_of_n"].figure.axes
    start = results["splits"]["val"]["start"]["best_of_n"]
    heights = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    for point in start:
        assert {(point["n"], point["low"]), (point["n"], point["high"])} <= heights


def test_differences_have_a_panel_for_every_variant_but_the_reference(plots):
    axes = plots["difference_to_reference_over_n"].figure.axes
    titles = [one.get_title() for one in axes if one.get_visible()]
    assert titles == ["mean_reward", "max_at_k", "TEA & <friends>", "calibrated_tea", "optimal_tea"]


def test_forest_is_ordered_by_the_headline_difference(results, plots):
    axes = plots["difference_to_start"].figure.axes[0]
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    means = [float(line.get_xdata()[0]) for line in dots]
    found = results["splits"]["val"]["variants"].values()
    assert means == sorted(policy["against_start"][-1]["mean"] for policy in found)


def test_many_variants_are_lines_without_bands_and_have_them_in_the_panels_of_differences():
    many = results_of(variants=14, splits=("val",))
    plots = {plot.name: plot for plot in all_plots(many)}
    (axes,) = plots["best_of_n"].figure.axes
    assert len(axes.get_lines()) == 15 and not axes.collections
    panels = [axes for axes in plots["difference_to_reference_over_n"].figure.axes if axes.get_visible()]
    assert len(panels) == 13
    assert all(len(axes.collections) == 1 for axes in panels)


def test_over_kl_starts_at_the_start_and_skips_variants_without_kl(results):
    changed = results | {"checkpoints": results["checkpoints"] | {"tea": [{"step": 0.0, "kl": None, "best_of_n": []}]}}
    curves = over_kl(ResultsView(changed), 128)
    assert "tea" not in curves and len(curves) == 5
    assert curves["grpo"].x[0] == 0.0
    assert curves["grpo"].mean == [point["best_of_n"][-1]["mean"] for point in results["checkpoints"]["grpo"]]


def test_plots_draw_unknown_bounds_and_one_variant():
    results = results_of(variants=2, splits=("val",))
    for policy in results["splits"]["val"]["variants"].values():
        for point in policy["best_of_n"]:
            point |= {"low": None, "high": None, "se": None}
    results["variants"], results["labels"] = ["grpo"], {"grpo": "costs $5 or $6"}
    plots = {plot.name: plot for plot in all_plots(results)}
    assert "difference_to_reference" not in plots
    assert image(plots["best_of_n"].figure, "svg") and image(plots["reward_histograms"].figure, "svg")
