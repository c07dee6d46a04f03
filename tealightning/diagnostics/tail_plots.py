"""Plots of the tail report: QQ lines, predicted against measured best-of-n."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no global backend is touched

from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail_checks import TailChecks
from tealightning.functional.tail_shape import (
    expected_normal_order_statistics,
    gaussian_tail_null,
    standardised_tail,
)


def plot_qq(checks: TailChecks, path: Path) -> Path:
    """The upper tails of all prompts against Gaussian order statistics.

    Every tail is moved and scaled to the mean and spread that a Gaussian's has there, then averaged over prompts rank
    by rank. The band is where 95% of such averages of Gaussian samples lie.
    """
    size, k = checks.samples.shape[1], checks.tested.shape[1]
    expected = expected_normal_order_statistics(size, k)
    null = gaussian_tail_null(size, k)
    found = mean_over_prompts(standardised_tail(checks.tested, size))
    half = 1.96 * null.profile_std / found.num_prompts.double().sqrt()
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    band = (null.profile_mean - half, null.profile_mean + half)
    axes.fill_between(expected, *band, color="0.8", label="Gaussian, 95%")
    axes.plot(expected, null.profile_mean, color="0.4", linewidth=1, label="Gaussian")
    axes.errorbar(
        expected,
        found.mean,
        yerr=1.96 * found.standard_error,
        fmt="o",
        markersize=3,
        linewidth=1,
        label=f"rewards, mean of {int(found.num_prompts[0])} prompts",
    )
    axes.set_xlabel(f"expected order statistics of {size} standard normals, upper {k}")
    axes.set_ylabel("standardised rewards")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def plot_prediction(rows: Sequence[dict[str, Any]], m: int, path: Path) -> Path:
    """Predicted and measured best-of-n on a log-n axis, with two standard errors over prompts.

    Args:
        rows: As `tail.prediction_rows` returns them.
        m: Samples that the predictions are made from.
        path: File to write.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ns = [row["n"] for row in rows]

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    for name, label in (("measured", "measured on the others"), ("predicted", f"predicted from {m}")):
        axes.errorbar(ns, column(name), yerr=2 * column(f"{name}_se"), marker="o", markersize=4, capsize=3, label=label)
    unbiased = column("predicted") - column("gaussian_error")
    axes.plot(ns, unbiased, "--", color="0.4", label="predicted, without its bias for a Gaussian")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.minorticks_off()
    axes.set_xlabel("n (samples a prompt, the best one kept)")
    axes.set_ylabel("best-of-n above the mean\n(reward standard deviations)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
