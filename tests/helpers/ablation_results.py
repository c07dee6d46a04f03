"""Made-up results of an ablation in the form of results.json, every number from a seeded generator."""

from typing import Any

import numpy as np

NS = [1, 4, 16, 64, 128]
NAMES = ["mean_reward", "grpo", "max_at_k", "tea", "calibrated_tea", "optimal_tea"]
NAMES += [f"tea_m{m}_N{n}" for m in (16, 32, 64) for n in (64, 128, 512)] + [f"direct_alpha{a}" for a in range(15)]
LEAVES = ("checkpoints", "equal_kl", "training", "histograms")
BUDGETS = ("optimizer_steps", "rollouts", "generated_tokens", "trained_tokens", "wall_seconds")
ERROR = (
    'ValueError: "loss" was NaN | step <12> of __init__ & a_b\nsee 100% of {it}'  # breaks a table that does not escape
)


def results_of(
    *,
    variants: int = 6,
    seeds: int = 5,
    splits: tuple[str, ...] = ("val", "test"),
    gold: bool = True,
    kl: bool = True,
    leave_out: tuple[str, ...] = (),
    failed: bool = True,
    steps: int = 40,
) -> dict[str, Any]:
    """Results with `variants` variants (30 at most) and the reference `grpo`.

    Args:
        leave_out: Of LEAVES: what is null, as when nothing was measured.
        failed: One run failed, with an error full of special characters, and one is missing.
    """
    rng = np.random.default_rng(7)
    names = NAMES[:variants]
    results: dict[str, Any] = {
        "schema_version": 1,
        "name": "prose",
        "title": "The prose world's estimators",
        "description": "Every estimator on the embedded world, at equal optimizer steps.",
        "provenance": {
            "command": "tealightning compare -c configs/ablations/prose.yaml",
            "commit": "0123abc45",
            "seed": "0",
            "versions": "tealightning 0.1, Python 3.11.2, torch 2.11",
        },
        "created": "2026-01-01T00:00:00+00:00",
        "spec": {
            "name": "prose",
            "variants": {name: {"model.estimator": name} for name in names},
            "seeds": [0, 1],
        },
        "confidence": 0.95,
        "bootstrap_samples": 4000,
        "statistics": [
            "Intervals are percentiles of 4000 bootstrap resamples over seeds and prompts.",
            "P-values at the headline n are corrected over variants by Holm's method.",
        ],
        "ns": NS,
        "headline_n": 128,
        "reference": "grpo",
        "equal": {"what": "optimizer_steps", "amount": steps},
        "variants": names,
        "labels": {"tea": "TEA & <friends>"},
        "runs": runs_of(rng, names, seeds, failed, steps),
        "budgets": {
            name: dict(zip(BUDGETS, [steps, steps * 256, *rng.integers(1e5, 9e5, 2) / 3, 91.73], strict=True))
            for name in names
        },
        "splits": {split: split_of(rng, names, seeds, gold, kl, failed) for split in splits},
        "checkpoints": {name: checkpoints_of(rng, gold, kl, steps) for name in names},
        "equal_kl": equal_kl_of(rng, names),
        "training": {name: training_of(rng, steps) for name in names},
        "histograms": histograms_of(rng, names),
    }
    return plain(results | {name: None for name in leave_out})


def estimate(rng: np.random.Generator, mean: float, spread: float = 0.05) -> dict[str, Any]:
    se = spread * (0.5 + rng.random())
    return {"mean": mean + 0.3 * se * rng.normal(), "low": mean - 2 * se, "high": mean + 2 * se, "se": se}


def curve(rng: np.random.Generator, lift: float = 0.0) -> list[dict[str, Any]]:
    return [{"n": n, **estimate(rng, -1 + lift + 0.45 * np.log2(n) ** 0.8)} for n in NS]


def differences(rng: np.random.Generator, gap: float) -> list[dict[str, Any]]:
    return [
        {
            "n": n,
            **estimate(rng, gap * np.log2(2 * n) / 8, 0.03),
            "p_value": float(np.exp(-150 * abs(gap))),
            "p_adjusted": min(1.0, 5 * float(np.exp(-150 * abs(gap)))) if n == 128 else None,
            "probability_of_improvement": estimate(rng, 0.5 + gap),
            "win_rate": estimate(rng, 0.5 + gap / 2),
        }
        for n in NS
    ]


def diagnostics(rng: np.random.Generator, kl: bool) -> dict[str, Any]:
    return {
        "kl": estimate(rng, 1 + rng.random()) if kl else None,
        "kl_per_token": estimate(rng, 0.05, 0.01) if kl else None,
        "completion_length": estimate(rng, 20 + 5 * rng.random(), 0.5),
        "truncated_fraction": estimate(rng, 0.3),
        "distinct_1": estimate(rng, 0.2 + 0.2 * rng.random(), 0.02),
        "distinct_2": estimate(rng, 0.6 + 0.2 * rng.random(), 0.02),
        "self_similarity": estimate(rng, 0.3 + 0.2 * rng.random(), 0.02),
        "reward_std": estimate(rng, 0.8 + 0.3 * rng.random()),
        "unscorable_fraction": {"mean": 0.0, "low": None, "high": None, "se": None},
    }


def split_of(
    rng: np.random.Generator, names: list[str], seeds: int, gold: bool, kl: bool, failed: bool
) -> dict[str, Any]:
    return {
        "num_prompts": 48,
        "samples_per_prompt": 128,
        "start": {
            "best_of_n": curve(rng),
            "gold_best_of_n": curve(rng, -0.2) if gold else None,
            "diagnostics": diagnostics(rng, kl),
        },
        "variants": {
            name: {
                "seeds": list(range(seeds - 2 if failed and name == names[-1] else seeds)),
                "best_of_n": curve(rng, 0.3 + 0.03 * index),
                "gold_best_of_n": curve(rng, 0.1 - 0.1 * index) if gold else None,
                "against_reference": None if name == "grpo" else differences(rng, 0.02 * (index - 1)),
                "against_start": differences(rng, 0.3 + 0.03 * index),
                "diagnostics": diagnostics(rng, kl),
            }
            for index, name in enumerate(names)
        },
    }


def checkpoints_of(rng: np.random.Generator, gold: bool, kl: bool, steps: int) -> list[dict[str, Any]]:
    found = []
    for share in (0.0, 0.25, 0.5, 1.0):
        distance = {"mean": 0.0, "low": 0.0, "high": 0.0, "se": 0.0} if share == 0 else estimate(rng, 2 * share)
        lift = 0.5 * share**0.7
        golden = curve(rng, 0.4 * share - 0.5 * share**2) if gold else None
        found.append(
            {
                "step": share * steps,
                "kl": distance if kl else None,
                "best_of_n": curve(rng, lift),
                "gold_best_of_n": golden,
            }
        )
    return found


def equal_kl_of(rng: np.random.Generator, names: list[str]) -> dict[str, Any]:
    points = {
        name: [
            {
                "kl": kl,
                "best_of_n": curve(rng, 0.2 * kl),
                "against_reference": None
                if name == "grpo"
                else [row | {"p_value": 0.25} for row in curve(rng, 0.01 - 0.5 * kl)],
            }
            for kl in (0.5, 1.0)
        ]
        for name in names
    }
    return {
        "kls": [0.5, 1.0],
        "unit": "nats a completion",
        "variants": {name: [found[0], None] if name == "tea" else found for name, found in points.items()},
    }


def training_of(rng: np.random.Generator, steps: int) -> dict[str, Any]:
    axis = np.arange(1, steps + 1)
    series: dict[str, Any] = {"step": axis}
    for metric, scale in (("reward_mean", 0.5), ("kl_per_token", 2.0), ("completion_length", 5.0)):
        mean = scale * (axis / steps) ** 0.7 + 0.05 * scale * rng.normal(size=steps)
        series[metric] = {"mean": mean, "low": mean - 0.1 * scale, "high": mean + 0.1 * scale}
    return series


def histograms_of(rng: np.random.Generator, names: list[str]) -> dict[str, Any]:
    edges = np.linspace(-4, 4, 33)
    density = lambda mean, spread: np.histogram(rng.normal(mean, spread, 4000), edges, density=True)[0]  # noqa: E731
    return {
        "edges": edges,
        "start": density(-1, 1),
        "variants": {name: density(-0.5 + 0.05 * i, 0.9 + 0.02 * i) for i, name in enumerate(names)},
    }


def runs_of(rng: np.random.Generator, names: list[str], seeds: int, failed: bool, steps: int) -> list[dict[str, Any]]:
    runs = []
    for name in names:
        for seed in range(seeds):
            spent = dict(
                zip(BUDGETS, [steps, steps * 256, *rng.integers(1e5, 9e5, 2), 60 + 30 * rng.random()], strict=True)
            )
            run = {
                "variant": name,
                "seed": seed,
                "status": "finished",
                "error": None,
                "folder": f"runs/{name}/seed_{seed}",
            }
            runs.append(run | {"hash": "f00d", "commit": "0123abc45", "versions": {"torch": "2.11"}} | spent)
    if failed:
        unknown = dict.fromkeys(BUDGETS)
        runs[-1] |= {"status": "failed", "error": ERROR} | unknown
        runs[-2] |= {"status": "missing"} | unknown
    return runs


def plain(value: Any) -> Any:
    """Numpy's numbers and arrays as Python's, as JSON has them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
