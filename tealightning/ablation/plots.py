"""List the plots of an ablation with their captions."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from tealightning.ablation.plot_bars import BARS, diagnostic, plot_completions, plot_forest, plot_histograms
from tealightning.ablation.plot_curves import (
    needs_panels,
    over_kl,
    over_n,
    plot_differences,
    plot_over_kl,
    plot_over_kl_panels,
    plot_over_n,
    plot_over_n_panels,
    plot_training,
    plot_training_panels,
    training_metrics,
)
from tealightning.ablation.results_view import START, Results, evaluated, interval_name, label, main_split, split_name


@dataclass(kw_only=True, slots=True)
class Plot:
    """A figure, the name of its files, a caption, and what stands in for it where it cannot be seen."""

    name: str
    figure: Figure
    caption: str
    alt: str


def all_plots(results: Results) -> list[Plot]:
    """Every plot that the results have the numbers for; names are unique."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a label is one
        plots = [plot for split in results.get("splits") or {} for plot in split_plots(results, split)]
        return [*plots, *kl_plots(results), *training_plots(results)]


def split_plots(results: Results, split: str) -> Iterator[Plot]:
    """Plots of one prompt set; those of sets after the main one are fewer, and named after it."""
    suffix = "" if split == main_split(results) else f"_{split}"
    where = split_name(split)
    yield from best_of_n_plots(results, split, suffix)
    if any(policy.get("against_reference") for policy in evaluated(results, split).values()):
        yield from reference_plots(results, split, suffix)
    if any(policy.get("against_start") for policy in evaluated(results, split).values()):
        title = f"Difference to the policy before training, {where}"
        yield Plot(
            name=f"difference_to_start{suffix}",
            figure=plot_forest(results, split, "against_start", title),
            caption=f"What training changed on the {where}: paired differences to the policy before training, "
            f"{interval_name(results)} intervals, ordered by the left panel. A star: significant after correction.",
            alt=f"Forest plot of every variant's difference to the policy before training, {where}.",
        )
    if split == main_split(results) and any(
        diagnostic(policy, key) for policy in evaluated(results, split).values() for key in BARS
    ):
        yield Plot(
            name="completions",
            figure=plot_completions(results, split),
            caption=f"Completions on the {where}, {interval_name(results)} intervals. Dashed: before training. High "
            "self-similarity and low distinct-2 mean that samples of a prompt repeat each other.",
            alt=f"Length, distinct-2, self-similarity and reward spread of every variant's completions, {where}.",
        )


def best_of_n_plots(results: Results, split: str, suffix: str) -> Iterator[Plot]:
    """Curves over n by the training reward, and by the gold reward where there is one."""
    where, interval = split_name(split), interval_name(results)
    kinds = {"best_of_n": "Best-of-n", "gold_best_of_n": "Gold reward of the best of n"}
    for quantity, title in kinds.items():
        if not over_n(results, split, quantity).keys() - {START}:
            continue
        panels = needs_panels(results) and split == main_split(results)
        bands = f"bands: {interval} intervals"
        if needs_panels(results):
            bands = "bands are in the next figure" if panels else "intervals are in the table"
        yield Plot(
            name=f"{quantity}{suffix}",
            figure=plot_over_n(results, split, quantity, f"{title}, {where}"),
            caption=f"{title} on the {where}; {bands}.",
            alt=f"{title} against n for every variant and the policy before training, {where}.",
        )
        if panels:
            yield Plot(
                name=f"{quantity}_panels{suffix}",
                figure=plot_over_n_panels(results, split, quantity, f"{title}, {where}"),
                caption=f"{title} of each variant with its {interval} band, beside "
                f"{label(results, results['reference'])} (black) and the policy before training (dashed).",
                alt=f"{title} against n, a panel for each variant, {where}.",
            )


def reference_plots(results: Results, split: str, suffix: str) -> Iterator[Plot]:
    reference, where, interval = label(results, results["reference"]), split_name(split), interval_name(results)
    yield Plot(
        name=f"difference_to_reference{suffix}",
        figure=plot_forest(results, split, "against_reference", f"Difference to {reference}, {where}"),
        caption=f"Paired differences to {reference} on the {where}, {interval} intervals, ordered by the left panel. A "
        "star: significant after correction.",
        alt=f"Forest plot of every variant's difference to {reference}, {where}.",
    )
    if not suffix:
        yield Plot(
            name="difference_to_reference_over_n",
            figure=plot_differences(results, split),
            caption=f"Difference to {reference} over n on the {where}, {interval} bands. A star: significant at "
            f"n = {results['headline_n']} after correction.",
            alt=f"Difference in best-of-n to {reference} against n, a panel for each variant, {where}.",
        )


def kl_plots(results: Results) -> Iterator[Plot]:
    """Reward against the distance from the start, over the evaluations of training."""
    n, interval = results["headline_n"], interval_name(results)
    bands = "" if needs_panels(results) else f" Bands: {interval} intervals."
    if over_kl(results, n):
        parts = [("best_of_n", n, f"best-of-{n}")]
        parts += [("best_of_n", 1, "mean reward (n = 1)")] if n != 1 and over_kl(results, 1) else []
        yield Plot(
            name="best_of_n_against_kl",
            figure=plot_over_kl(results, parts, "Reward against KL to the start"),
            caption="Every evaluation of training, from the start (KL 0) to the final policy: the curve on top gets "
            f"more reward for the same distance.{bands}",
            alt=f"Best-of-{n} and mean reward against KL to the start for every variant.",
        )
        if needs_panels(results):
            yield Plot(
                name="best_of_n_against_kl_panels",
                figure=plot_over_kl_panels(results, n),
                caption=f"Best-of-{n} against KL with the {interval} band of each variant, beside "
                f"{label(results, results['reference'])} (black).",
                alt=f"Best-of-{n} against KL, a panel for each variant.",
            )
    if over_kl(results, n, "gold_best_of_n"):
        parts = [("best_of_n", n, f"training reward, best-of-{n}"), ("gold_best_of_n", n, f"gold reward, best-of-{n}")]
        yield Plot(
            name="gold_against_kl",
            figure=plot_over_kl(results, parts, "Training reward and gold reward against KL"),
            caption="Where the left curves go on rising and the right ones fall, the training reward is "
            f"over-optimised.{bands}",
            alt=f"Best-of-{n} by the training reward and by the gold reward against KL for every variant.",
        )


def training_plots(results: Results) -> Iterator[Plot]:
    if metrics := training_metrics(results):
        yield Plot(
            name="training",
            figure=plot_training(results),
            caption=f"Training, means over seeds{'' if needs_panels(results) else ' with bands over seeds'}.",
            alt=f"Training curves of every variant: {', '.join(metrics)}.",
        )
        if needs_panels(results):
            yield Plot(
                name="training_panels",
                figure=plot_training_panels(results, metrics[0]),
                caption="The same with the band over seeds of each variant.",
                alt=f"Training curves of {metrics[0]}, a panel for each variant.",
            )
    if set((results.get("histograms") or {}).get("variants") or ()) & {*results["variants"]}:
        yield Plot(
            name="reward_histograms",
            figure=plot_histograms(results),
            caption="Rewards of single samples before training (grey) and after.",
            alt="Histograms of rewards before and after training, a panel for each variant.",
        )


def image(figure: Figure, kind: str) -> bytes:
    """The figure as `png` (150 dpi) or `svg`; the same figure gives the same bytes."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tealightning"}):
        figure.savefig(
            stream, format=kind, dpi=150, facecolor="white", metadata={"Date": None} if kind == "svg" else None
        )
    return stream.getvalue()
