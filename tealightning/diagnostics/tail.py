"""Check the upper tail of a reward and write the report: verdict, estimator to use, tables, plots."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats
from torch import Tensor

from tealightning.diagnostics.fidelity import Row
from tealightning.diagnostics.plots import plot_prediction, plot_qq
from tealightning.diagnostics.pool import RolloutPool
from tealightning.errors import UserError
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import tail_size
from tealightning.functional.tail_checks import MIN_TAIL, REJECTED_BELOW, TailChecks, check_tail, summarise
from tealightning.functional.tail_shape import gaussian_tail_null
from tealightning.reporting.provenance import provenance_lines
from tealightning.reporting.tables import markdown_table, write_csv

# Discrete: more than half of a tail is tied, at few different values.
TIED, FEW_VALUES = 0.5, 10
# Nearly discrete: on average more than this share of a prompt's tested rewards has one and the same value.
LARGEST_ATOM = 0.25
# Two-pointed: in most prompts more than this share of the tested rewards' variance lies between two clusters. A uniform
# distribution has 0.75, two equal clusters with a gap as wide as each of them 0.92.
TWO_CLUSTERS = 0.9
# Two-sided level of each test: a Gaussian reward is called something else in about 1% of the cases.
SIGNIFICANCE = 0.003
# Smaller ones do not matter, however significant; a prediction's is in standard deviations of the reward.
SMALLEST_SHAPE_DIFFERENCE, SMALLEST_PREDICTION_ERROR = 0.05, 0.1
# With a larger standard error a Student t with 5 degrees of freedom (0.22 above a Gaussian) could be missed.
LARGEST_SHAPE_ERROR = 0.06
# Fewer do not tell how much prompts differ.
MIN_PROMPTS = 10
# Rollouts in the tail of a training group from which a shape of its own pays. With fewer, a generalised Pareto fit is
# so noisy that a Gaussian tail comes closer in every analytic world (docs/results/gradient-fidelity.md).
LONG_TAIL = 16

_EMPIRICAL = {"tail": "empirical"}
_THRESHOLD = "with a threshold between the clusters if they are the same for all prompts"
ADVICE: dict[str, tuple[str, dict[str, Any], str]] = {
    "gaussian": ("optimal_tea", {}, "calibrated_tea"),
    "heavier": ("tea", {}, "optimal_tea, less biased and noisier"),  # dividing by the group's spread tames outliers
    "bounded": ("optimal_tea", {}, f"tea with tail: gpd, where groups have {LONG_TAIL} rollouts or more in the tail"),
    "bounded_long": ("tea", {"tail": "gpd"}, "optimal_tea, more biased and less noisy"),
    "discrete": ("tea", _EMPIRICAL, "max_at_k, if training samples as many as deployment"),
    "nearly_discrete": ("tea", _EMPIRICAL, "max_at_k, or tail_rl"),
    "two_pointed": ("tea", _EMPIRICAL, f"tail_rl; or pass_at_n, {_THRESHOLD}"),
    "binary": ("pass_at_n", {}, ""),
    "undecided": ("tea", _EMPIRICAL, "any of them; nothing is known of the tail"),
}
"""Estimator, its settings besides `target_n` and `alpha`, and what else fits, by what was found: what comes closest in
the analytic worlds of that kind (docs/results/gradient-fidelity.md)."""


class Verdict(NamedTuple):
    """One word on the tail, its reason in a sentence, and what to train with."""

    name: str  # gaussian, heavier, bounded, discrete, two_pointed, binary or undecided
    reason: str
    estimator: str  # registered name
    settings: dict[str, Any]  # of the estimator, besides `target_n` and `alpha`
    alternative: str  # what else fits, in words


def judge_tail(checks: TailChecks, *, training_tail: int = 4) -> Verdict:
    """The first row of `_findings` that holds, with its advice, which depends on the rollouts in the tail of a training
    group: `training_tail = ceil(alpha * m)`."""
    finding, reason = next((name, reason) for name, holds, reason in _findings(checks) if holds)
    is_long = finding == "bounded" and training_tail >= LONG_TAIL
    estimator, settings, alternative = ADVICE["bounded_long" if is_long else finding]
    if finding == "binary":
        low, high = float(checks.samples.min()), float(checks.samples.max())
        settings = {} if low <= 0.5 < high else {"threshold": (low + high) / 2}
    reason = reason[0].upper() + reason[1:]
    return Verdict(finding.removeprefix("nearly_"), reason, estimator, settings, alternative)


def _findings(checks: TailChecks) -> Iterator[tuple[str, bool, str]]:
    """Rows (finding, whether it holds, reason): values first (too few, discrete, or two-pointed), then the shape, the
    predictions, and the QQ line."""
    part = f"{'all' if checks.tested_share == 1 else f'the upper {checks.tested_share:g}'} of a prompt's rewards"
    with_spread = int((checks.distinct > 1).sum())
    yield "undecided", with_spread == 0, "no prompt has two different rewards, so there is nothing to look at."
    low, high = float(checks.samples.min()), float(checks.samples.max())
    yield "binary", checks.distinct_in_all == 2, f"All rewards are one of two values, {low:g} and {high:g}."
    ties, values = float(checks.ties.mean()), float(checks.distinct_in_tail.double().median())
    reason = (
        f"{ties:.0%} of the upper tail's samples share their value with another one of the prompt, and a tail has "
        f"{values:.0f} different values (median): a coarse reward, or a policy that repeats its answers, far from "
        "a Gaussian tail."
    )
    yield "discrete", ties > TIED and values <= FEW_VALUES, reason
    atom = float(checks.atoms[checks.distinct > 1].mean())
    reason = (
        f"{atom:.0%} of {part} have one and the same value (mean over prompts): the reward is nearly discrete, far "
        "from a Gaussian tail. A verifier's score, a clip, or a policy that repeats its answers."
    )
    yield "nearly_discrete", atom > LARGEST_ATOM, reason
    clusters = checks.two_clusters[~checks.two_clusters.isnan()]
    separate = clusters > TWO_CLUSTERS
    share = float(separate.double().mean())
    # as of a verifier with a little noise: a Gaussian would be extrapolated from the gap between
    reason = (
        f"Two clusters explain {clusters[separate].mean():.0%} of the variance of {part}, in {share:.0%} of the "
        "prompts: the reward is nearly two-pointed, far from a Gaussian tail."
    )
    yield "two_pointed", share > 0.5, reason
    size = checks.tested.shape[1]
    reason = f"{part} are {size} samples, and {MIN_TAIL} are needed: sample more a prompt."
    yield "undecided", checks.shape is None, reason
    reason = f"{with_spread} prompts have different rewards, and {MIN_PROMPTS} are needed."
    yield "undecided", with_spread < MIN_PROMPTS, reason
    yield from _findings_on_the_shape(checks, part)


def _findings_on_the_shape(checks: TailChecks, part: str) -> Iterator[tuple[str, bool, str]]:
    assert checks.shape is not None and checks.qq_p is not None
    mean, error, gaussian = (float(each) for each in checks.shape[:3])
    prompts = int(checks.shape.num_prompts)
    difference, gain = float(checks.shape.shape - checks.shape.gaussian), ""
    described = f"the shape of {part} is {mean:.2f} ± {error:.2f}, that of Gaussian samples {gaussian:.2f}"
    if checks.held_out is not None:
        misses = mean_over_prompts(checks.held_out.error[:, -1])
        budget = checks.held_out.ns[-1]
        surplus = float(misses.mean - checks.held_out.gaussian_error[-1])  # beyond a Gaussian's
        part_of_gain = abs(surplus) / float(mean_over_prompts(checks.held_out.measured[:, -1]).mean)
        gain = f"; best-of-{budget} differs from a Gaussian's by {part_of_gain:.0%} of its gain"
    is_clear = two_sided(difference, error, prompts) < SIGNIFICANCE and abs(difference) >= SMALLEST_SHAPE_DIFFERENCE
    yield "heavier", is_clear and difference > 0, f"{described}, clearly above it{gain}."
    yield "bounded", is_clear and difference < 0, f"{described}, clearly below it{gain}."
    if checks.held_out is not None:
        level = two_sided(surplus, float(misses.standard_error), int(misses.num_prompts))
        reason = (
            f"best-of-{budget} is predicted {abs(surplus):.2f} ± {float(misses.standard_error):.2f} reward standard "
            f"deviations {'lower' if surplus < 0 else 'higher'}, relative to what is measured, than for Gaussian "
            f"samples{gain}."
        )
        is_clear = level < SIGNIFICANCE and abs(surplus) >= SMALLEST_PREDICTION_ERROR
        yield "heavier" if surplus < 0 else "bounded", is_clear, reason
    levels = checks.qq_p[~checks.qq_p.isnan()]
    rejected, total = int((levels < REJECTED_BELOW).sum()), len(levels)
    reason = (
        f"the shape is a Gaussian's on average, but {rejected / total:.0%} of the prompts have a tail that is not "
        "straight (5% expected): a mixture, or prompts that differ; see the table of prompts."
    )
    yield "undecided", stats.binom.sf(rejected - 1, total, REJECTED_BELOW) < SIGNIFICANCE, reason
    needed = prompts * (error / LARGEST_SHAPE_ERROR) ** 2
    reason = f"{described}, too uncertain to tell: about {needed:.0f} prompts, or more samples a prompt, would do."
    yield "undecided", error > LARGEST_SHAPE_ERROR, reason
    yield "gaussian", True, f"{described}, and neither the QQ lines nor the predictions speak against it."


def two_sided(difference: float, standard_error: float, num_prompts: int) -> float:
    """p-value of a difference from 0 over prompts, by Student's t; a difference without any error is significant."""
    if num_prompts < 2:
        return 1.0
    if standard_error == 0:
        return 0.0 if difference != 0 else 1.0
    return float(2 * stats.t.sf(abs(difference) / standard_error, num_prompts - 1))


class TailDiagnosis(NamedTuple):
    """The checks of a pool of rewards and what they amount to."""

    ids: list[str]  # Q prompts that were checked
    num_prompts: int  # that there were
    m: int
    alpha: float
    checks: TailChecks
    verdict: Verdict


def diagnose_pool(pool: RolloutPool, *, m: int = 16, alpha: float = 0.25, **settings: Any) -> TailDiagnosis:
    """Check the upper tails of a pool; see `functional.tail_checks.check_tail` for the settings."""
    try:
        checks = check_tail(pool.rewards, m=m, alpha=alpha, **settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    verdict = judge_tail(checks, training_tail=tail_size(alpha, m))
    ids = [pool.ids[row] for row in checks.rows.tolist()]
    return TailDiagnosis(ids=ids, num_prompts=len(pool.ids), m=m, alpha=alpha, checks=checks, verdict=verdict)


def check_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each check: the result, and what Gaussian rewards give."""
    checks = diagnosis.checks
    size, k, tested = checks.samples.shape[1], checks.tail.shape[1], checks.tested.shape[1]
    upper, tail = f"upper {checks.tested_share:g}", f"upper {diagnosis.alpha:g}"
    value = {name.removeprefix("tail_"): float(number) for name, number in summarise(checks).items()}
    rows: list[tuple[str, str, str]] = []
    if checks.shape is not None:
        null = gaussian_tail_null(size, tested)
        half = value["shape_se"] * float(stats.t.ppf(0.975, max(int(checks.shape.num_prompts) - 1, 1)))
        interval = f"95%: {value['shape'] - half:.2f} to {value['shape'] + half:.2f}"
        shape, clusters = f"{value['shape']:.3f} ± {value['shape_se']:.3f}", _median_share(checks.two_clusters)
        rows += [
            (f"QQ line of the {upper}: mean R²", f"{value['qq_r2']:.3f}", f"{float(null.r2.mean()):.3f}"),
            ("prompts whose QQ line is rejected", f"{value['qq_rejected']:.1%}", "5.0%"),
            (f"shape of the {upper}", f"{shape} ({interval})", f"{value['shape_gaussian']:.3f}"),
            (f"variance of the {upper} between two clusters (median)", clusters, f"{float(null.two_clusters):.0%}"),
        ]
    if checks.held_out is not None:
        error = f"{value['prediction_error']:.3f} ± {value['prediction_error_se']:.3f}"
        check = f"best-of-{checks.held_out.ns[-1]} from {diagnosis.m}, predicted - measured"
        rows.append((check, error, f"{value['prediction_error_gaussian']:.3f}"))
        rows.append(("covered by its 90% interval", f"{value['coverage']:.1%}", "90.0%"))
    distinct = int(checks.distinct_in_tail.median()) if len(checks.rows) else 0
    rows += [
        (f"most frequent value of the {upper} (median)", _median_share(checks.atoms), "0%"),
        (f"tied samples in the {tail}", f"{value['ties']:.1%}", "0.0%"),
        (f"different values in the {tail} (median)", f"{distinct} of {k}", f"{k}"),
    ]
    return [dict(zip(("check", "found", "Gaussian rewards"), row, strict=True)) for row in rows]


def _median_share(shares: Tensor) -> str:
    known = shares[~shares.isnan()]
    return f"{float(known.median()):.0%}" if len(known) else "-"


def _rows(columns: dict[str, Any]) -> list[Row]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def prediction_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each n, numbers in standard deviations of a prompt's rewards; empty without held-out samples."""
    held_out = diagnosis.checks.held_out
    if held_out is None:
        return []
    columns: dict[str, Any] = {"n": held_out.ns}
    for name in ("predicted", "measured", "error", "covered"):
        estimate = mean_over_prompts(getattr(held_out, name))
        columns |= {name: estimate.mean.tolist(), f"{name}_se": estimate.standard_error.tolist()}
    return _rows(columns | {"gaussian_error": held_out.gaussian_error.tolist()})


def prompt_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each prompt; the shapes here are noisy and not corrected for their bias."""
    checks = diagnosis.checks
    columns: dict[str, Any] = {"id": diagnosis.ids, "samples": [checks.samples.shape[1]] * len(diagnosis.ids)}
    columns |= {"distinct": checks.distinct, "ties": checks.ties, "most_frequent": checks.atoms}
    columns |= {"two_clusters": checks.two_clusters, "qq_r2": checks.qq_r2, "qq_p": checks.qq_p}
    columns["raw_shape"] = checks.shapes
    if checks.held_out is not None:
        n, error, covered = checks.held_out.ns[-1], checks.held_out.error, checks.held_out.covered
        columns |= {f"prediction_error_{n}": error[:, -1], f"covered_{n}": covered[:, -1]}
    known = {name: values for name, values in columns.items() if values is not None}
    return _rows({name: values.tolist() if isinstance(values, Tensor) else values for name, values in known.items()})


def verdict_text(diagnosis: TailDiagnosis) -> str:
    """The verdict, its reason, what was tested, and the estimator to use."""
    verdict, checks = diagnosis.verdict, diagnosis.checks
    settings = "".join(f", {name}: {value}" for name, value in verdict.settings.items())
    return (
        f"Verdict: **{verdict.name}**. {verdict.reason}\n\n"
        f"{len(diagnosis.ids)} of {diagnosis.num_prompts} prompts with {checks.samples.shape[1]} samples each. Tested: "
        f"the upper {checks.tested_share:g} of each prompt's rewards, {checks.tested.shape[1]} samples; an estimator "
        f"with alpha = {diagnosis.alpha:g} reads the upper {diagnosis.alpha:g} and assumes that the upper "
        f"{min(1.0, 2 * diagnosis.alpha):g} is Gaussian.\n\n"
        f"Estimator: `{verdict.estimator}{settings}`{f' (or {verdict.alternative})' if verdict.alternative else ''}."
    )


def tables_text(diagnosis: TailDiagnosis) -> str:
    """Both tables as markdown."""
    text = markdown_table(check_rows(diagnosis))
    lines = []
    for row in prediction_rows(diagnosis):
        line = {"n": row["n"]}
        line |= {key: f"{row[key]:.3f} ± {row[f'{key}_se']:.3f}" for key in ("predicted", "measured", "error")}
        lines.append(line | {"Gaussian error": f"{row['gaussian_error']:.3f}", "covered": f"{row['covered']:.1%}"})
    legend = (
        f"Best-of-n predicted from {diagnosis.m} samples and measured on the prompt's others, above its mean, in "
        "standard deviations of its rewards; ± standard error over prompts."
    )
    return "\n\n".join([text, legend, markdown_table(lines)]) if lines else text


def write_diagnosis(folder: Path, diagnosis: TailDiagnosis, provenance: Mapping[str, str]) -> list[Path]:
    """Write `tail.md`, `.csv`, `.json` and the plots that M is large enough for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    checks, predictions = diagnosis.checks, prediction_rows(diagnosis)
    texts = verdict_text(diagnosis), tables_text(diagnosis), provenance_lines(dict(provenance))
    record: dict[str, Any] = {"verdict": diagnosis.verdict._asdict(), "prompts": len(diagnosis.ids)}
    settings = {"m": diagnosis.m, "alpha": diagnosis.alpha, "tested_share": checks.tested_share}
    record |= {"samples": checks.samples.shape[1], **settings}
    record["summary"] = {name: float(value) for name, value in summarise(checks).items()}
    record |= {"predictions": predictions, "provenance": dict(provenance)}
    files = [folder / "tail.md", folder / "tail.csv", folder / "tail.json"]
    files[0].write_text("\n\n".join(["# Tail of the reward", *texts]) + "\n", encoding="utf-8")
    write_csv(files[1], prompt_rows(diagnosis))
    without_nan = json.loads(json.dumps(record), parse_constant=lambda name: None)  # JSON has no NaN and no infinity
    files[2].write_text(json.dumps(without_nan, indent=2) + "\n", encoding="utf-8")
    if checks.shape is not None and int(checks.shape.num_prompts) > 0:
        files.append(folder / "qq.png")
        plot_qq(checks, files[-1])
    if predictions:
        files.append(folder / "prediction.png")
        plot_prediction(predictions, diagnosis.m, files[-1])
    return files
