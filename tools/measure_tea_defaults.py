"""Measure what TEA's `baseline` and `scale` do when prompts have different reward scales; prints a markdown table.

    python tools/measure_tea_defaults.py

World: 64 prompts a step, m rollouts each, reward `scale_p * Z` with Z standard normal and `scale_p` spread evenly (in
the logarithm) over a factor of 10. All prompts share a location and a log-scale parameter, whose scores are `Z` and
`Z^2 - 1`, and a direction unrelated to the reward, whose score is independent standard normal noise. The gradient of
best-of-N points to `(1, c_N)` in the first two.
"""

from typing import Any

import torch
from torch import Tensor

from tealightning.estimators import build_estimator
from tealightning.functional.tail import expected_max_normal

PROMPTS, TARGET_N, ALPHA, STEPS = 64, 128, 0.25, 1500
VARIANTS: list[tuple[str, dict[str, Any]]] = [("grpo", {})] + [
    ("tea", {"target_n": TARGET_N, "alpha": ALPHA, "baseline": baseline, "scale": scale})
    for scale in ("none", "reward_std", "rms")
    for baseline in ("none", "mean", "loo")
]


def measure(name: str, kwargs: dict[str, Any], m: int) -> list[str]:
    """One row: direction, noise in the shared and in the unrelated directions, effective prompts, zeros."""
    generator = torch.Generator().manual_seed(0)
    reward_scale = torch.logspace(-1, 0, PROMPTS, dtype=torch.float64).repeat(STEPS)[:, None]
    z = torch.randn(STEPS * PROMPTS, m, dtype=torch.float64, generator=generator)
    noise = torch.randn(z.shape, dtype=torch.float64, generator=generator)
    advantages = build_estimator(name, **kwargs)(reward_scale * z)

    def per_prompt(score: Tensor) -> Tensor:
        return (advantages * score).mean(1).view(STEPS, PROMPTS)

    shared = torch.stack([per_prompt(z), per_prompt(z**2 - 1)], dim=-1)
    true_direction = torch.tensor([1.0, expected_max_normal(TARGET_N)], dtype=torch.float64)
    true_direction /= true_direction.norm()
    contribution = (shared @ true_direction).mean(0)  # of each prompt, over steps
    signal = contribution.mean()
    step = shared.mean(1)
    effective = contribution.sum() ** 2 / contribution.square().sum()
    return [
        f"{m}",
        name,
        str(kwargs.get("scale", "-")),
        str(kwargs.get("baseline", "-")),
        f"{step.mean(0)[1] / step.mean(0)[0]:.2f}",
        f"{step.var(0).sum().sqrt() / signal:.3f}",
        f"{per_prompt(noise).mean(1).std() / signal:.3f}",
        f"{effective:.0f}",
        f"{(advantages == 0).double().mean():.2f}",
    ]


def main() -> None:
    """Print the table."""
    c_n = expected_max_normal(TARGET_N)
    print(f"Truth: scale/location = c_{TARGET_N} = {c_n:.2f}; {PROMPTS} prompts, {STEPS} steps.\n")
    header = ["m", "estimator", "scale", "baseline", "scale/location", "noise, shared", "noise, unrelated"]
    header += ["effective prompts", "zeros"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for m in (16, 32):
        for name, kwargs in VARIANTS:
            print("| " + " | ".join(measure(name, kwargs, m)) + " |")


if __name__ == "__main__":
    main()
