"""Verdict of the tail checks: one word, why, and which estimator fits."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scipy.stats import binom
from scipy.stats import t as student_t
from torch import Tensor

from tealightning.functional.statistics import MeanEstimate, mean_over_prompts
from tealightning.functional.tail_checks import MIN_TAIL, REJECTED_BELOW, TailChecks
from tealightning.functional.tail_prediction import HeldOut
from tealightning.functional.tail_shape import ShapeFit

Name = Literal["gaussian", "heavier", "bounded", "discrete", "two_pointed", "binary", "undecided"]

TIED = 0.5
FEW_VALUES = 10
"""Discrete: more than the share `TIED` of a tail is tied, at no more than `FEW_VALUES` different values."""
LARGEST_ATOM = 0.25
"""Nearly discrete: on average more than this share of a prompt's tested rewards has one and the same value."""
TWO_CLUSTERS = 0.9
"""Two-pointed: in most prompts more than this share of the tested rewards' variance lies between two clusters. A
uniform distribution has 0.75, two equal clusters with a gap as wide as each of them 0.92."""

SIGNIFICANCE = 0.003
"""Two-sided level of each test: a Gaussian reward is called something else in about 1% of the cases."""
SMALLEST_SHAPE_DIFFERENCE = 0.05
"""A smaller difference of the shape does not matter, however significant."""
SMALLEST_PREDICTION_ERROR = 0.1
"""The same for a prediction, in standard deviations of the reward."""
LARGEST_SHAPE_ERROR = 0.06
"""With a larger standard error a Student t with 5 degrees of freedom (0.22 above a Gaussian) could be missed."""
MIN_PROMPTS = 10
"""Fewer do not tell how much prompts differ."""
LONG_TAIL = 16
"""Rollouts in the tail of a training group from which a shape of its own pays. With fewer, a generalised Pareto fit is
so noisy that a Gaussian tail comes closer in every analytic world (docs/results/gradient-fidelity.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One word on the tail, its reason in a sentence, and what to train with."""

    name: Name
    reason: str
    estimator: str  # registered name
    settings: dict[str, Any] = field(default_factory=dict)  # of the estimator, besides `target_n` and `alpha`
    alternative: str = ""  # what else fits, in words


def _empirical(name: Name, reason: str, alternative: str) -> Verdict:
    return Verdict(name=name, reason=reason, estimator="tea", settings={"tail": "empirical"}, alternative=alternative)


def _by_values(checks: TailChecks) -> Verdict | None:
    """Binary, discrete or two-pointed; None for what looks like a continuous reward."""
    if checks.distinct_in_all == 2:
        low, high = checks.samples.unique().tolist()
        return Verdict(
            name="binary",
            reason=f"All rewards are one of two values, {low:g} and {high:g}.",
            estimator="pass_at_n",
            settings={} if low <= 0.5 < high else {"threshold": (low + high) / 2},
        )
    return _discrete(checks) or _nearly_discrete(checks) or _two_pointed(checks)


def _discrete(checks: TailChecks) -> Verdict | None:
    ties = float(checks.ties.mean())
    values = float(checks.distinct_in_tail.double().median())
    if ties <= TIED or values > FEW_VALUES:
        return None
    reason = (
        f"{ties:.0%} of the upper tail's samples share their value with another one of the prompt, and a tail "
        f"has {values:.0f} different values (median): a coarse reward, or a policy that repeats its answers, far from "
        "a Gaussian tail."
    )
    return _empirical("discrete", reason, "max_at_k, if training samples as many as deployment")


def _nearly_discrete(checks: TailChecks) -> Verdict | None:
    """Discrete if much of what was tested is a single value, whatever the rest looks like."""
    share = float(checks.atoms[checks.distinct > 1].mean())
    if share <= LARGEST_ATOM:
        return None
    reason = (
        f"{share:.0%} of {_tested(checks)} have one and the same value (mean over prompts): the reward is nearly "
        "discrete, far from a Gaussian tail. A verifier's score, a clip, or a policy that repeats its answers."
    )
    return _empirical("discrete", reason, "max_at_k, or tail_rl")


def _two_pointed(checks: TailChecks) -> Verdict | None:
    """Two clusters, as of a verifier with a little noise: a Gaussian would be extrapolated from the gap between."""
    known = checks.two_clusters[~checks.two_clusters.isnan()]
    separate = known > TWO_CLUSTERS
    if len(known) == 0 or float(separate.double().mean()) <= 0.5:
        return None
    reason = (
        f"Two clusters explain {known[separate].mean():.0%} of the variance of {_tested(checks)}, in "
        f"{separate.double().mean():.0%} of the prompts: the reward is nearly two-pointed, far from a Gaussian tail."
    )
    alternative = "tail_rl; or pass_at_n, with a threshold between the clusters if they are the same for all prompts"
    return _empirical("two_pointed", reason, alternative)


def _tested(checks: TailChecks) -> str:
    """The samples that were compared with a Gaussian, in words."""
    part = "all" if checks.tested_share == 1 else f"the upper {checks.tested_share:g}"
    return f"{part} of a prompt's rewards"


def judge_tail(checks: TailChecks, *, training_tail: int = 4) -> Verdict:
    """The verdict: values first (too few, discrete, or two-pointed), then the shape, the predictions, and the QQ line.

    Args:
        checks: Of many samples a prompt.
        training_tail: `ceil(alpha * m)`, rollouts in the tail of a group in training; decides which estimator is named.
    """
    with_spread = int((checks.distinct > 1).sum())
    if with_spread == 0:
        return _undecided("no prompt has two different rewards, so there is nothing to look at")
    if (verdict := _by_values(checks)) is not None:
        return verdict
    shape = checks.shape
    if shape is None:
        return _undecided(
            f"{_tested(checks)} are {checks.tested.shape[1]} samples, and {MIN_TAIL} are needed: sample more a prompt"
        )
    if with_spread < MIN_PROMPTS:
        return _undecided(f"{with_spread} prompts have different rewards, and {MIN_PROMPTS} are needed")
    return (
        _by_shape(checks, shape, training_tail)
        or _by_prediction(checks, training_tail)
        or _by_line(checks)
        or _by_precision(checks, shape)
        or _gaussian(checks, shape)
    )


def _by_shape(checks: TailChecks, shape: ShapeFit, training_tail: int) -> Verdict | None:
    """Heavier or bounded if the shape is clearly not a Gaussian's."""
    difference = float(shape.shape - shape.gaussian)
    is_clear = two_sided(difference, float(shape.standard_error), int(shape.num_prompts)) < SIGNIFICANCE
    if not is_clear or abs(difference) < SMALLEST_SHAPE_DIFFERENCE:
        return None
    reason = f"{_describe(checks, shape)}, clearly {'above' if difference > 0 else 'below'} it"
    return _not_gaussian(checks, "heavier" if difference > 0 else "bounded", reason, training_tail)


def _prediction_surplus(held_out: HeldOut) -> tuple[float, MeanEstimate]:
    """The error of the prediction at the largest n: beyond a Gaussian's, and as it is."""
    error = mean_over_prompts(held_out.error[:, -1])
    return float(error.mean - held_out.gaussian_error[-1]), error


def _by_prediction(checks: TailChecks, training_tail: int) -> Verdict | None:
    """Heavier or bounded if a Gaussian tail predicts best-of-n clearly too low or too high."""
    if checks.held_out is None:
        return None
    surplus, error = _prediction_surplus(checks.held_out)
    is_clear = two_sided(surplus, float(error.standard_error), int(error.num_prompts)) < SIGNIFICANCE
    if not is_clear or abs(surplus) < SMALLEST_PREDICTION_ERROR:
        return None
    reason = (
        f"best-of-{checks.held_out.ns[-1]} is predicted {abs(surplus):.2f} ± {float(error.standard_error):.2f} reward "
        f"standard deviations {'lower' if surplus < 0 else 'higher'}, relative to what is measured, than for Gaussian "
        "samples"
    )
    return _not_gaussian(checks, "heavier" if surplus < 0 else "bounded", reason, training_tail)


def _not_gaussian(checks: TailChecks, name: Name, reason: str, training_tail: int) -> Verdict:
    """What comes closest in the analytic worlds of that kind (docs/results/gradient-fidelity.md)."""
    if checks.held_out is not None:
        surplus, _ = _prediction_surplus(checks.held_out)
        part = abs(surplus) / float(mean_over_prompts(checks.held_out.measured[:, -1]).mean)
        reason = f"{reason}; best-of-{checks.held_out.ns[-1]} differs from a Gaussian's by {part:.0%} of its gain"
    settings: dict[str, Any] = {}
    if name == "heavier":  # dividing by the group's spread tames the outliers
        estimator, alternative = "tea", "optimal_tea, less biased and noisier"
    elif training_tail >= LONG_TAIL:
        estimator, settings, alternative = "tea", {"tail": "gpd"}, "optimal_tea, more biased and less noisy"
    else:
        alternative = f"tea with tail: gpd, where groups have {LONG_TAIL} rollouts or more in the tail"
        estimator = "optimal_tea"
    reason = _sentence(reason)
    return Verdict(name=name, reason=reason, estimator=estimator, settings=settings, alternative=alternative)


def _by_line(checks: TailChecks) -> Verdict | None:
    """Undecided if too many prompts have a bent QQ line although the shape is right on average."""
    assert checks.qq_p is not None
    levels = checks.qq_p[~checks.qq_p.isnan()]
    rejected, total = int((levels < REJECTED_BELOW).sum()), len(levels)
    if binom.sf(rejected - 1, total, REJECTED_BELOW) >= SIGNIFICANCE:
        return None
    return _undecided(
        f"the shape is a Gaussian's on average, but {rejected / total:.0%} of the prompts have a tail that is not "
        "straight (5% expected): a mixture, or prompts that differ; see the table of prompts"
    )


def _by_precision(checks: TailChecks, shape: ShapeFit) -> Verdict | None:
    """Undecided if a relevant difference could have been missed."""
    error = float(shape.standard_error)
    if error <= LARGEST_SHAPE_ERROR:
        return None
    needed = int(shape.num_prompts) * (error / LARGEST_SHAPE_ERROR) ** 2
    return _undecided(
        f"{_describe(checks, shape)}, too uncertain to tell: about {needed:.0f} prompts, or more samples a prompt, "
        "would do"
    )


def _gaussian(checks: TailChecks, shape: ShapeFit) -> Verdict:
    return Verdict(
        name="gaussian",
        reason=_sentence(f"{_describe(checks, shape)}, and neither the QQ lines nor the predictions speak against it"),
        estimator="optimal_tea",
        alternative="calibrated_tea",
    )


def _undecided(reason: str) -> Verdict:
    return _empirical("undecided", _sentence(reason), "any of them; nothing is known of the tail")


def _describe(checks: TailChecks, shape: ShapeFit) -> str:
    return (
        f"the shape of {_tested(checks)} is {float(shape.shape):.2f} ± {float(shape.standard_error):.2f}, that of "
        f"Gaussian samples {float(shape.gaussian):.2f}"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def two_sided(difference: float, standard_error: float, num_prompts: int) -> float:
    """p-value of a difference from 0 over prompts, by Student's t; a difference without any error is significant."""
    if num_prompts < 2:
        return 1.0
    if standard_error == 0:
        return 0.0 if difference != 0 else 1.0
    return float(2 * student_t.sf(abs(difference) / standard_error, num_prompts - 1))


def interval(mean: Tensor, standard_error: Tensor, num_prompts: Tensor) -> tuple[float, float]:
    """95% interval of a mean over prompts, by Student's t."""
    half = float(standard_error) * float(student_t.ppf(0.975, max(int(num_prompts) - 1, 1)))
    return float(mean) - half, float(mean) + half
