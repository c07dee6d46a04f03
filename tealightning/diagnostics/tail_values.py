"""Verdicts that the values of a reward allow: two of them, few, one that many samples share, or two clusters."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tealightning.functional.tail_checks import TailChecks

Name = Literal["gaussian", "heavier", "bounded", "discrete", "two_pointed", "binary", "undecided"]

TIED = 0.5
FEW_VALUES = 10
"""Discrete: more than the share `TIED` of a tail is tied, at no more than `FEW_VALUES` different values."""
LARGEST_ATOM = 0.25
"""Nearly discrete: on average more than this share of a prompt's tested rewards has one and the same value."""
TWO_CLUSTERS = 0.9
"""Two-pointed: in most prompts more than this share of the tested rewards' variance lies between two clusters. A
uniform distribution has 0.75, two equal clusters with a gap as wide as each of them 0.92."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One word on the tail, its reason in a sentence, and what to train with."""

    name: Name
    reason: str
    estimator: str  # registered name
    settings: dict[str, Any] = field(default_factory=dict)  # of the estimator, besides `target_n` and `alpha`
    alternative: str = ""  # what else fits, in words


def by_values(checks: TailChecks) -> Verdict | None:
    """Binary, discrete or two-pointed; None for what looks like a continuous reward."""
    if checks.distinct_in_all == 2:
        return _binary(checks.samples)
    return _discrete(checks) or _nearly_discrete(checks) or _two_pointed(checks)


def _binary(samples: Tensor) -> Verdict:
    low, high = samples.unique().tolist()
    return Verdict(
        name="binary",
        reason=f"All rewards are one of two values, {low:g} and {high:g}.",
        estimator="pass_at_n",
        settings={} if low <= 0.5 < high else {"threshold": (low + high) / 2},
    )


def _discrete(checks: TailChecks) -> Verdict | None:
    ties = float(checks.ties.mean())
    values = float(checks.distinct_in_tail.double().median())
    if ties <= TIED or values > FEW_VALUES:
        return None
    return Verdict(
        name="discrete",
        reason=f"{ties:.0%} of the upper tail's samples share their value with another one of the prompt, and a tail "
        f"has {values:.0f} different values (median): a coarse reward, or a policy that repeats its answers, far from "
        "a Gaussian tail.",
        estimator="tea",
        settings={"tail": "empirical"},
        alternative="max_at_k, if training samples as many as deployment",
    )


def _nearly_discrete(checks: TailChecks) -> Verdict | None:
    """Discrete if much of what was tested is a single value, whatever the rest looks like."""
    share = float(checks.atoms[checks.distinct > 1].mean())
    if share <= LARGEST_ATOM:
        return None
    return Verdict(
        name="discrete",
        reason=f"{share:.0%} of {tested(checks)} have one and the same value (mean over prompts): the reward is nearly "
        "discrete, far from a Gaussian tail. A verifier's score, a clip, or a policy that repeats its answers.",
        estimator="tea",
        settings={"tail": "empirical"},
        alternative="max_at_k, or tail_rl",
    )


def _two_pointed(checks: TailChecks) -> Verdict | None:
    """Two clusters, as of a verifier with a little noise: a Gaussian would be extrapolated from the gap between."""
    known = checks.two_clusters[~checks.two_clusters.isnan()]
    separate = known > TWO_CLUSTERS
    if len(known) == 0 or float(separate.double().mean()) <= 0.5:
        return None
    return Verdict(
        name="two_pointed",
        reason=f"Two clusters explain {known[separate].mean():.0%} of the variance of {tested(checks)}, in "
        f"{separate.double().mean():.0%} of the prompts: the reward is nearly two-pointed, far from a Gaussian tail.",
        estimator="tea",
        settings={"tail": "empirical"},
        alternative="tail_rl; or pass_at_n, with a threshold between the clusters if they are the same for all prompts",
    )


def tested(checks: TailChecks) -> str:
    """What was compared with a Gaussian, in words."""
    part = "all" if checks.tested_share == 1 else f"the upper {checks.tested_share:g}"
    return f"{part} of a prompt's rewards"
