"""Training in the two-arm world: which arm an estimator's gradient settles on.

A softmax policy chooses between A, which has the larger mean and the larger best of 16, and B, which has the larger
best of 128 and beyond (see `tealightning.diagnostics.worlds`). Every step plays 64 prompts of m rollouts; the
advantages are divided by their root mean square over the batch, so that all estimators train at one speed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from tealightning.diagnostics.fidelity import Advantages
from tealightning.diagnostics.measurements import EstimatorSpec, try_out
from tealightning.diagnostics.worlds import draw_rewards
from tealightning.functional.moments import ratio_or_zero

PROMPTS, STEPS, LEARNING_RATE = 64, 300, 0.03
SETTINGS = ((16, 128), (16, 512), (32, 512), (64, 512))
"""(m, N) of the table."""


def train_two_arms(
    estimator: Advantages, m: int, *, seeds: Sequence[int], prompts: int = PROMPTS, steps: int = STEPS
) -> Tensor:
    """Final probability of B for every seed: [S] float64, from 0.5 and by Adam at 0.03.

    The seeds are trained side by side; a seed's result does not depend on the others.

    Args:
        estimator: Rewards [P, m] to advantages [P, m].
        m: Rollouts a prompt.
        seeds: One for each training.
        prompts: Prompts a step.
        steps: Adam steps.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    logits = torch.zeros(len(seeds), 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE, maximize=True)
    for _ in range(steps):
        policy = torch.softmax(logits.detach(), dim=1)
        arms, rewards = _play(policy[:, 1], prompts, m, generators)
        advantages = estimator(rewards.flatten(0, 1)).view_as(rewards)
        rms = advantages.square().mean(dim=(1, 2), keepdim=True).sqrt()
        advantages = ratio_or_zero(advantages, rms)
        chosen = torch.stack([1 - arms, arms], dim=-1)
        logits.grad = (advantages[..., None] * (chosen - policy[:, None, None])).mean(dim=(1, 2))
        optimizer.step()
    return torch.softmax(logits.detach(), dim=1)[:, 1]


def _play(probability: Tensor, prompts: int, m: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Arms [S, P, m] float64 (1 = B) and their rewards."""
    arms, rewards = [], []
    for p, generator in zip(probability, generators, strict=True):
        arms.append((torch.rand(prompts, m, generator=generator, dtype=torch.float64) < p).double())
        rewards.append(draw_rewards(arms[-1], generator))
    return torch.stack(arms), torch.stack(rewards)


def decisions(
    specs: Iterable[EstimatorSpec],
    *,
    settings: Sequence[tuple[int, int]] = SETTINGS,
    alpha: float = 0.25,
    seeds: Sequence[int] = range(5),
    progress: bool = False,
) -> list[dict[str, Any]]:
    """A row for every (m, N) and estimator: mean, lowest and highest final probability of B over the seeds.

    An estimator that refuses an m has a row with the reason as its `note` and no probabilities.
    """
    rows = []
    jobs = [(m, target_n, spec) for m, target_n in settings for spec in specs]
    for m, target_n, spec in tqdm(jobs, unit="training", desc="decision", disable=not progress, leave=False):
        estimator = spec.build(m=m, target_n=target_n, alpha=alpha)
        row: dict[str, Any] = {"estimator": spec.label, "m": m, "target_n": target_n, "alpha": alpha}
        trial = try_out(estimator, m)
        if not trial.refused:
            final = train_two_arms(estimator, m, seeds=seeds)
            row |= {"mean": float(final.mean()), "lowest": float(final.min()), "highest": float(final.max())}
        rows.append(row | {"seeds": len(seeds), "note": trial.refused or trial.warned})
    return rows
