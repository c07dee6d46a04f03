"""Gradient fidelity on a policy: what m rollouts say, against the best-of-N gradient of a large pool.

The exact gradient of a language model is unknown, so everything is cross-fitted: each prompt's pool is cut into halves
A and B, each half has its own oracle and its own groups of m, and what groups of one half say is compared only with
the oracle of the other half. Products of two independent unbiased estimates are unbiased, which a norm or a cosine of
one noisy estimate is not. The products of several random splits are averaged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tealightning.diagnostics.measurements import EstimatorSpec, try_out
from tealightning.diagnostics.policy_fidelity_groups import (
    Cut,
    group_gradients,
    group_weights,
    half_size,
    split_halves,
    stride,
)
from tealightning.diagnostics.policy_fidelity_statistics import (
    STEP_PROMPTS,
    Estimate,
    Gradients,
    averaged,
    estimates,
    oracle_estimates,
)
from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator

SPLITS = 4
"""Random cuts of the pool into halves, and of the halves into groups: less noise from which rollouts met."""


@dataclass(kw_only=True, slots=True)
class FidelityRow:
    """What was found for an estimator at a group size, or why nothing was."""

    estimator: str
    group_size: int
    values: dict[str, Estimate]  # empty if it refused
    note: str = ""
    in_reward_units: bool = False  # its gradient has a scale that can be right or wrong


@dataclass(kw_only=True, slots=True)
class FidelityReport:
    """The rows, and what the oracles say of each other."""

    ceiling: dict[str, Estimate]  # see `oracle_estimates`, and `sign_agreement` of the oracles' coordinates
    rows: list[FidelityRow]


class FidelityStudy:
    """Estimators against the oracles of a pool.

    Args:
        rewards: [Q, M] float64; NaN = unscorable.
        scores: [Q, M, D] projected score vectors.
        target_n: N, at most half of the scored rollouts of every prompt.
        group_sizes: Those that may be asked for, at most as large as a half.
        alpha: Tail level of the estimators that take one.
        seed: Of the splits, the simulated steps and the bootstrap; the same ones for every estimator.

    Raises:
        ValueError: for fewer than two prompts or too few rollouts.
    """

    def __init__(
        self,
        rewards: Tensor,
        scores: Tensor,
        *,
        target_n: int,
        group_sizes: Sequence[int],
        alpha: float = 0.25,
        seed: int = 0,
    ) -> None:
        if len(rewards) < 2:
            raise UserError(f"prompts must be at least 2 for an interval, got {len(rewards)}.")
        self.half_size = half_size(rewards, smallest=max(target_n, *group_sizes))
        self.rewards, self.scores = rewards, scores
        self.group_sizes = list(dict.fromkeys(group_sizes))
        self.target_n, self.alpha, self.seed = target_n, alpha, seed

    def run(self, specs: Sequence[EstimatorSpec], on_progress: Callable[[], Any] = lambda: None) -> FidelityReport:
        """Every estimator at every group size; `on_progress` is called after each, in each split."""
        rows, trials, measured_rows = [], [], []
        for m in self.group_sizes:
            for spec in specs:
                row, estimator = self._row(spec, m)
                rows.append(row)
                if estimator is not None:
                    trials.append((estimator, m))
                    measured_rows.append(row)
        ceiling, found = self.measure(trials, on_progress)
        for row, values in zip(measured_rows, found, strict=True):
            row.values = values
        return FidelityReport(ceiling=ceiling, rows=rows)

    def _row(self, spec: EstimatorSpec, m: int) -> tuple[FidelityRow, AdvantageEstimator | None]:
        """A row without values, and the estimator unless it refuses groups of m."""
        try:
            estimator = spec.build(m=m, target_n=self.target_n, alpha=self.alpha)
        except ValueError as error:
            return FidelityRow(estimator=spec.label, group_size=m, values={}, note=str(error)), None
        trial = try_out(estimator, m, float(self.rewards[self.rewards.isfinite()].min()))
        note = trial.refused or trial.warned
        row = FidelityRow(estimator=spec.label, group_size=m, values={}, note=note, in_reward_units=trial.reward_units)
        return row, None if trial.refused else estimator

    def measure(
        self, trials: Sequence[tuple[AdvantageEstimator, int]], on_progress: Callable[[], Any] = lambda: None
    ) -> tuple[dict[str, Estimate], list[dict[str, Estimate]]]:
        """What the oracles say of each other, and all figures (`estimates`, `simulated_steps`) of each estimator with
        its group size. Simulated steps are drawn from the first split."""
        oracle_parts: list[Gradients] = []
        parts: list[list[Gradients]] = [[] for _ in trials]
        steps: list[dict[str, Estimate]] = [{} for _ in trials]
        for split in range(SPLITS):
            halves = split_halves(self.rewards, self.scores, self.half_size, self._generator(split))
            oracles = [half.oracle(self.target_n) for half in halves]
            oracle_parts.append(Gradients.of(oracles, oracles, torch.zeros(len(self.rewards), dtype=torch.float64)))
            if split == 0:
                agreement = _sign_agreement(*oracles)
            for m in self.group_sizes:
                cuts = [Cut.of(half, m) for half in halves]
                for index, (estimator, size) in enumerate(trials):
                    if size != m:
                        continue
                    weights = [group_weights(cut.half, cut.groups, estimator) for cut in cuts]
                    parts[index].append(_products(oracles, cuts, weights))
                    if split == 0:
                        steps[index] = self._steps(oracles, cuts, weights)
                    on_progress()
        ceiling = oracle_estimates(averaged(oracle_parts), seed=self.seed) | {"sign_agreement": agreement}
        found = [estimates(averaged(part), seed=self.seed) | step for part, step in zip(parts, steps, strict=True)]
        return ceiling, found

    def _steps(self, oracles: Sequence[Tensor], cuts: Sequence[Cut], weights: Sequence[Tensor]) -> dict[str, Estimate]:
        gradients = [group_gradients(cut.thinned, cut.groups, each) for cut, each in zip(cuts, weights, strict=True)]
        opposite = [oracle.mean(dim=0)[:: stride(oracle.shape[1])] for oracle in reversed(oracles)]
        generator = self._generator(SPLITS)  # the same draws for every estimator
        found: dict[str, Estimate] = {}
        for num_prompts in STEP_PROMPTS:
            found |= simulated_steps(gradients, opposite, num_prompts=num_prompts, generator=generator)
        return found

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 8) + stream)


def _products(oracles: Sequence[Tensor], cuts: Sequence[Cut], weights: Sequence[Tensor]) -> Gradients:
    means, noises = zip(*(cut.mean_and_noise(each) for cut, each in zip(cuts, weights, strict=True)), strict=True)
    return Gradients.of(oracles, means, (noises[0] + noises[1]) / 2)


def _sign_agreement(first: Tensor, second: Tensor) -> Estimate:
    """Share of coordinates in which two mean oracles have the same sign."""
    return Estimate(float((first.mean(dim=0).sign() == second.mean(dim=0).sign()).double().mean()))


STEPS = 200
"""Steps drawn from each half."""


def simulated_steps(
    groups: Sequence[Tensor], oracles: Sequence[Tensor], *, num_prompts: int, generator: torch.Generator
) -> dict[str, Estimate]:
    """Mean cosine with an independent oracle, and mean share of coordinates with its sign, of steps over P prompts.

    Prompts and groups are drawn with replacement. Nothing is corrected: the oracle's noise lowers both figures, and so
    does the pool's own noise once P is not small beside the groups that there are.

    Args:
        groups: Gradients of the groups of each half, [Q, G, D].
        oracles: For each half the mean oracle [D] of the other.
        num_prompts: P.

    Returns:
        `simulated_cosine_P` and `sign_agreement_P`, means over both halves.
    """
    cosines, agreements = [], []
    for gradients, oracle in zip(groups, oracles, strict=True):
        flat = gradients.flatten(0, 1)
        drawn = torch.randint(len(flat), (STEPS, num_prompts), generator=generator)
        shares = torch.zeros(STEPS, len(flat), dtype=flat.dtype)
        shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_prompts, dtype=flat.dtype))
        steps = shares @ flat
        cosines.append(torch.cosine_similarity(steps.double(), oracle[None], dim=1).mean())
        agreements.append((steps.sign() == oracle.sign()).double().mean())
    return {
        f"simulated_cosine_{num_prompts}": Estimate(float(torch.stack(cosines).mean())),
        f"sign_agreement_{num_prompts}": Estimate(float(torch.stack(agreements).mean())),
    }
