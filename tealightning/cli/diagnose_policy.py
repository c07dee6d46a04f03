"""Command `diagnose gradients -c CONFIG`: gradient fidelity on the policy and the reward of a config."""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tealightning.cli.policy_pool import collect_pool
from tealightning.diagnostics.measurements import EstimatorSpec, parse_estimators
from tealightning.diagnostics.policy_fidelity import SPLITS, FidelityReport, FidelityStudy
from tealightning.diagnostics.policy_fidelity_report import (
    LEGEND,
    ceiling_lines,
    fidelity_table,
    plot_fidelity,
    write_csv_rows,
)
from tealightning.diagnostics.pool import RolloutPool, write_rewards
from tealightning.diagnostics.projections import LinearProjection, score_vectors
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS
from tealightning.reporting.provenance import provenance, provenance_lines
from tealightning.training.module import PostTrainingModule

BINARY_REWARDS = ("pass_at_n", "grpo_lead")
"""Estimators for rewards of 0 and 1, which say nothing about others."""

_DESCRIPTION = """\
How faithful each estimator's gradient from m rollouts is to the best-of-N gradient of the policy of a config. A large
pool of rollouts a prompt is sampled by the config's own engine and scored by its own reward; the oracle is the unbiased
best-of-N gradient of half a pool, and estimators are judged by groups of m of the other half. Gradients are random
projections of those of the policy's linear layers. -c and every other option go to the config, as in
`tealightning validate`: -c configs/quickstart.yaml --rollout.engine=TransformersEngine."""


def diagnose_policy_gradients(args: Sequence[str]) -> None:
    """Measure, print the table, and write page, CSV, plot and the pool's rewards.

    Raises:
        UserError: for options that do not fit each other, or a config that does not parse.
    """
    options, config_args = _parser().parse_known_args(args)
    asked = parse_estimators(options.estimators)
    _check(options, config_args)
    seconds = {}
    started = time.perf_counter()
    module, pool = collect_pool(config_args, num_prompts=options.prompts, num_samples=options.pool, split=options.split)
    seconds["rollouts"] = time.perf_counter() - started
    specs, reasons = _suitable(asked, pool) if options.estimators is None else (asked, [])

    started = time.perf_counter()
    projection = LinearProjection(module.policy, size=options.projection, seed=options.seed)
    scores = _score(module, pool, projection)
    seconds["score vectors"] = time.perf_counter() - started

    started = time.perf_counter()
    study = FidelityStudy(
        pool.rewards,
        scores,
        target_n=options.target_n,
        group_sizes=options.group_sizes,
        alpha=options.alpha,
        seed=options.seed,
    )
    with tqdm(total=SPLITS * len(specs) * len(study.group_sizes), desc="Estimators", dynamic_ncols=True) as bar:
        report = study.run(specs, on_progress=bar.update)
    seconds["estimators"] = time.perf_counter() - started
    facts = _facts(options, module, pool, projection, study, seconds)
    _write(options, args, pool, report, [*facts, *reasons])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tealightning diagnose gradients",
        usage="tealightning diagnose gradients -c CONFIG [-c CONFIG ...] [--setting=value ...] [options]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", dest="group_sizes", type=int, nargs="+", default=[16, 32], help="group sizes (default: 16 32)")
    add("-N", dest="target_n", type=int, default=128, help="best-of-N budget; at most half the pool (default: 128)")
    add("--alpha", type=float, default=0.25, help="tail level of the estimators that take one (default: 0.25)")
    add("--prompts", type=int, default=48, help="the first ones of the split (default: 48)")
    add("--pool", type=int, default=1024, help="rollouts a prompt, at least 2 N and 4 m (default: 1024)")
    add("--split", choices=["val", "test"], default="val", help="of the config's data (default: val)")
    add(
        "--estimators",
        nargs="+",
        metavar="NAME[:PARAMETER=VALUE,...]",
        help='as in: tea "direct:tail=gpd,alpha=0.5" (default: every registered one that suits the rewards)',
    )
    add("--projection", type=int, default=16, help="K: each weight's gradient becomes K x K numbers (default: 16)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of projection, groups and bootstrap; rollouts have the config's (default: 0)",
    )
    add("--out", type=Path, default=Path("runs/diagnose_policy"), help="folder (default: runs/diagnose_policy)")
    return parser


def _check(options: argparse.Namespace, config_args: Sequence[str]) -> None:
    """Refuse before anything is sampled."""
    if not any(arg.partition("=")[0] in ("-c", "--config") for arg in config_args):
        raise UserError("diagnose gradients measures the policy of a config: add -c configs/quickstart.yaml.")
    smallest = min(options.group_sizes)
    if smallest < 2 or options.target_n < 2:
        raise UserError(f"-m and -N must be at least 2, got {smallest} and {options.target_n}.")
    if options.prompts < 2:
        raise UserError(f"--prompts must be at least 2 for an interval over prompts, got {options.prompts}.")
    if options.projection < 1:
        raise UserError(f"--projection must be at least 1, got {options.projection}.")
    needed = max(2 * options.target_n, 4 * max(options.group_sizes))
    if options.pool < needed:
        raise UserError(
            f"--pool must be at least {needed}: each half needs N rollouts, and two groups of m; got {options.pool}."
        )


def _suitable(specs: Sequence[EstimatorSpec], pool: RolloutPool) -> tuple[list[EstimatorSpec], list[str]]:
    """The estimators that suit the rewards, and a sentence about the others."""
    scored = pool.rewards[pool.valid]
    lowest = float(scored.min()) if len(scored) else 0.0
    is_binary = bool(((scored == 0) | (scored == 1)).all())
    kinds = {
        "for rewards of 0 and 1; name it to see it": [s for s in specs if s.name in BINARY_REWARDS and not is_binary],
        f"some rewards are too low: {lowest:.4g}": [s for s in specs if ESTIMATORS.get(s.name).lowest_reward > lowest],  # type: ignore[attr-defined]
    }
    reasons = [f"left out: {', '.join(s.label for s in left)} ({why})" for why, left in kinds.items() if left]
    return [spec for spec in specs if not any(spec in left for left in kinds.values())], reasons


def _score(module: PostTrainingModule, pool: RolloutPool, projection: LinearProjection) -> Tensor:
    """[Q, M, D]."""
    with tqdm(total=pool.rewards.numel(), desc="Score vectors", unit=" rollouts", dynamic_ncols=True) as bar:
        score = partial(score_vectors, max_tokens=module.micro_batch_tokens, on_progress=bar.update)
        scores = [score(module.policy, batch, projection).unflatten(0, batch.rewards.shape) for batch in pool.batches]
    return torch.cat(scores)


def _facts(
    options: argparse.Namespace,
    module: PostTrainingModule,
    pool: RolloutPool,
    projection: LinearProjection,
    study: FidelityStudy,
    seconds: dict[str, float],
) -> list[str]:
    """What was measured, in short sentences."""
    unscored = int((~pool.valid).sum())
    spread = pool.rewards.nanmean(dim=1).std(), _std(pool.rewards)
    return [
        f"policy: {module.policy_path}, {projection.covered:.0%} of its trainable parameters (its linear layers) "
        f"projected to {projection.num_features} numbers",
        f"pool: {len(pool.ids)} prompts ({options.split}) with {options.pool} rollouts, {unscored} not scored, halves "
        f"of {study.half_size}; reward's standard deviation {spread[1]:.3g} within prompts, {spread[0]:.3g} between",
        f"N = {options.target_n}, alpha = {options.alpha:g}",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
    ]


def _std(rewards: Tensor) -> float:
    """Root mean square of the within-prompt standard deviations."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return float(centred.square().nanmean().sqrt())


def _write(
    options: argparse.Namespace,
    args: Sequence[str],
    pool: RolloutPool,
    report: FidelityReport,
    facts: Sequence[str],
) -> None:
    origin = provenance_lines(provenance(["diagnose", "gradients", *args], seed=options.seed))
    measured = "\n".join(f"- {fact}" for fact in facts)
    result = f"{ceiling_lines(report.ceiling)}\n\n{fidelity_table(report.rows)}"
    title = f"# Fidelity to the best-of-{options.target_n} gradient of a live policy"
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "policy_fidelity.md"
    page.write_text("\n\n".join([title, origin + "\n" + measured, result, LEGEND]) + "\n", encoding="utf-8")
    write_csv_rows(folder / "policy_fidelity.csv", report.rows)
    plot_fidelity(folder / "policy_fidelity.png", report, target_n=options.target_n)
    write_rewards(folder / "rewards.jsonl", pool)
    print(f"{measured}\n\n{result}\n")
    for name, file in (("Page", page), ("Figures", folder / "policy_fidelity.csv")):
        print(f"{name}: {file}")
    print(f"Plot: {folder / 'policy_fidelity.png'}\nRewards: {folder / 'rewards.jsonl'}")
