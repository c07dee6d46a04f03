"""Command `diagnose gradients -c CONFIG`: gradient fidelity on a pool of rollouts of a config's policy and reward."""

import argparse
import time
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from tealightning.callbacks import RolloutCallback
from tealightning.cli.options import at_least, new_parser, upper_share
from tealightning.cli.training import build_training
from tealightning.data import PromptDataModule
from tealightning.diagnostics import fidelity_report, policy_fidelity
from tealightning.diagnostics import pool as pools
from tealightning.diagnostics.measurements import EstimatorSpec, parse_estimators
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS
from tealightning.reporting.provenance import provenance
from tealightning.training.module import PostTrainingModule
from tealightning.types import PromptBatch

BINARY_REWARDS = ("pass_at_n", "grpo_lead")
"""Estimators for rewards of 0 and 1, which say nothing about others."""
_USAGE = "tealightning diagnose gradients -c CONFIG [-c CONFIG ...] [--setting=value ...] [options]"
_DESCRIPTION = """\
How faithful each estimator's gradient from m rollouts is to the best-of-N gradient of the policy of a config. A large
pool of rollouts a prompt is sampled by the config's own engine and scored by its own reward; the oracle is the unbiased
best-of-N gradient of half a pool, and estimators are judged by groups of m of the other half. Gradients are random
projections of those of the policy's linear layers. -c and every other option go to the config, as in
`tealightning validate`: -c configs/quickstart.yaml --rollout.engine=TransformersEngine."""


def diagnose_policy_gradients(args: Sequence[str]) -> None:
    """Measure, print the table, and write page, CSV, plot and the pool's rewards."""
    options, config_args = _parser().parse_known_args(args)
    specs = parse_estimators(options.estimators)
    needed = max(2 * options.target_n, 4 * max(options.group_sizes))  # each half needs N rollouts, and two groups of m
    if options.pool < needed:
        raise UserError(f"--pool must be at least {needed} (the larger of 2 N and 4 m), got {options.pool}.")
    times = [time.perf_counter()]
    module, pool = collect_pool(config_args, num_prompts=options.prompts, num_samples=options.pool, split=options.split)
    specs, left_out = _suitable(specs, pool) if options.estimators is None else (specs, [])

    times.append(time.perf_counter())
    projection = pools.LinearProjection(module.policy, size=options.projection, seed=options.seed)
    with tqdm(total=pool.rewards.numel(), desc="Score vectors", unit=" rollouts", dynamic_ncols=True) as bar:
        settings: dict[str, Any] = {"max_tokens": module.micro_batch_tokens, "on_progress": bar.update}
        vectors = [pools.score_vectors(module.policy, batch, projection, **settings) for batch in pool.batches]

    times.append(time.perf_counter())
    scores = torch.cat(vectors).view(*pool.rewards.shape, -1)
    settings = {name: getattr(options, name) for name in ("target_n", "group_sizes", "alpha", "seed")}
    ceiling, rows = policy_fidelity.measure_on_policy(pool.rewards, scores, specs, **settings)

    times.append(time.perf_counter())
    phases = ("rollouts", "score vectors", "estimators")
    seconds = [f"{name} {end - start:.0f}" for name, start, end in zip(phases, times, times[1:], strict=False)]
    facts = [*_facts(options, module, pool, projection), f"seconds: {', '.join(seconds)}", *left_out]
    source = provenance(["diagnose", "gradients", *args], seed=options.seed)
    files = fidelity_report.write_policy_fidelity(options.out, ceiling, rows, source, facts, target_n=options.target_n)
    files.append(options.out / "rewards.jsonl")
    pools.write_rewards(files[-1], pool)
    print("\n".join(f"- {fact}" for fact in facts))
    print(f"\n{fidelity_report.ceiling_text(ceiling)}\n\n{fidelity_report.policy_table(rows)}\n")
    for name, file in zip(("Page", "Figures", "Plot", "Rewards"), files, strict=True):
        print(f"{name}: {file}")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("gradients", "runs/diagnose_policy", usage=_USAGE, description=_DESCRIPTION)
    add = parser.add_argument
    add("-m", dest="group_sizes", type=at_least(2), nargs="+", default=[16, 32], help="group sizes (default: 16 32)")
    add("-N", dest="target_n", type=at_least(2), default=128, help="best-of-N, at most half the pool (default: 128)")
    add("--alpha", type=upper_share, default=0.25, help="tail level of the estimators that take one (default: 0.25)")
    prompts = at_least(2, " (for an interval over prompts)")
    add("--prompts", type=prompts, default=48, help="the first ones of the split (default: 48)")
    add("--pool", type=int, default=1024, help="rollouts a prompt, at least 2 N and 4 m (default: 1024)")
    add("--split", choices=["val", "test"], default="val", help="of the config's data (default: val)")
    estimators_help = 'as in: tea "direct:tail=gpd,alpha=0.5" (default: every registered one that suits the rewards)'
    add("--estimators", nargs="+", metavar="NAME[:PARAMETER=VALUE,...]", help=estimators_help)
    projection_help = "K: each weight's gradient becomes K x K numbers (default: 16)"
    add("--projection", type=at_least(1), default=16, help=projection_help)
    return parser


def _suitable(specs: Sequence[EstimatorSpec], pool: pools.RolloutPool) -> tuple[list[EstimatorSpec], list[str]]:
    """The estimators that suit the rewards, and a sentence about the others."""
    scored = pool.rewards[pool.rewards.isfinite()]
    lowest = float(scored.min()) if len(scored) else 0.0
    is_binary = bool(((scored == 0) | (scored == 1)).all())
    kinds = {
        "for rewards of 0 and 1; name it to see it": [s for s in specs if s.name in BINARY_REWARDS and not is_binary],
        f"some rewards are too low: {lowest:.4g}": [s for s in specs if ESTIMATORS.get(s.name).lowest_reward > lowest],  # type: ignore[attr-defined]
    }
    reasons = [f"left out: {', '.join(s.label for s in left)} ({why})" for why, left in kinds.items() if left]
    return [spec for spec in specs if not any(spec in left for left in kinds.values())], reasons


def _facts(
    options: argparse.Namespace, module: PostTrainingModule, pool: pools.RolloutPool, projection: pools.LinearProjection
) -> list[str]:
    """What was measured, in short sentences."""
    means = pool.rewards.nanmean(dim=1, keepdim=True)
    within = (pool.rewards - means).square().nanmean().sqrt()
    unscored = int((~pool.rewards.isfinite()).sum())
    return [
        f"policy: {module.policy_path}, {projection.covered:.0%} of its trainable parameters (its linear layers) "
        f"projected to {projection.num_features} numbers",
        f"pool: {len(pool.ids)} prompts ({options.split}) with {options.pool} rollouts, {unscored} not scored, "
        f"halves of {pools.half_size(pool.rewards)}; reward's standard deviation {within:.3g} within prompts, "
        f"{means.std():.3g} between",
        f"N = {options.target_n}, alpha = {options.alpha:g}",
    ]


def collect_pool(
    args: Sequence[str], *, num_prompts: int, num_samples: int, split: Literal["val", "test"] = "val"
) -> tuple[PostTrainingModule, pools.RolloutPool]:
    """Sample and score `num_samples` rollouts of the split's first `num_prompts` prompts; the module has its policy on
    the device that it sampled on.

    It is a `tealightning validate ARGS` (or `test`) with `max(ns) = num_samples`: the same engine, reward, sampling and
    seeds. Loggers and the config's callbacks are left out, and a prompt is a batch.

    Raises:
        UserError: for a config that does not parse, a split with fewer prompts, or several devices.
    """
    command = {"val": "validate", "test": "test"}[split]
    limits = [f"--trainer.limit_{each}_batches={num_prompts}" for each in ("val", "test")]
    without = ("logger=false", "callbacks=null", "enable_checkpointing=false", "enable_model_summary=false")
    overrides = [f"--model.ns=[{num_samples}]", *limits, *(f"--trainer.{setting}" for setting in without)]
    cli = build_training(command, [*args, *overrides])
    if cli.trainer.world_size > 1:  # before any process is launched
        raise UserError(
            f"a pool is collected on one device, got {cli.trainer.world_size}: set --trainer.devices=1 "
            "(and --trainer.num_nodes=1)."
        )
    collector = _BatchCollector(split, num_prompts)
    cli.trainer.callbacks.append(collector)  # type: ignore[attr-defined]
    cli.datamodule.val_batch_size = 1
    device = cli.trainer.strategy.root_device
    checkpoint = cli.config[command]["ckpt_path"]
    getattr(cli.trainer, command)(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.close()
    return cli.model.to(device), pools.pool_of(collector.batches)


class _BatchCollector(Callback):
    """Collects the batches of an evaluation, their rollouts on the CPU."""

    def __init__(self, split: Literal["val", "test"], num_prompts: int) -> None:
        self.split, self.num_prompts = split, num_prompts
        self.batches: list[PromptBatch] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would give another pool than was asked for, before anything is sampled."""
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        available = len(data.prompt_sets[self.split])
        if available < self.num_prompts:
            raise UserError(f"data.{self.split} has {available} prompts, and {self.num_prompts} were asked for.")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int, *args: Any
    ) -> None:
        """Keep the batch."""
        self.batches.append(batch.to("cpu"))

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
