"""Simulate training steps from a pool of rollouts, and measure how well each step points."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tealightning.diagnostics.live_statistics import Estimate

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
