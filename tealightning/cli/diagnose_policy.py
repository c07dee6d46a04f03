"""Command `diagnose gradients -c CONFIG`: gradient fidelity on a pool of rollouts of a config's policy and reward."""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from tealightning.callbacks import RolloutCallback
from tealightning.cli.diagnose import at_least
from tealightning.cli.training import build_training
from tealightning.data import PromptDataModule
from tealightning.diagnostics.fidelity_report import ceiling_text, policy_table, write_policy_fidelity
from tealightning.diagnostics.measurements import EstimatorSpec, parse_estimators
from tealightning.diagnostics.policy_fidelity import SPLITS, PolicyFidelity
from tealightning.diagnostics.pool import RolloutPool, pool_of, write_rewards
from tealightning.diagnostics.projections import LinearProjection, score_vectors
from tealightning.errors import UserError
from tealightning.estimators import ESTIMATORS
from tealightning.reporting.provenance import provenance
from tealightning.training.module import PostTrainingModule
from tealightning.types import PromptBatch

BINARY_REWARDS = ("pass_at_n", "grpo_lead")
"""Estimators for rewards of 0 and 1, which say nothing about others."""
_COMMANDS = {"val": "validate", "test": "test"}
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
    specs = parse_estimators(options.estimators)
    _check(options, config_args)
    times = [time.perf_counter()]
    module, pool = collect_pool(config_args, num_prompts=options.prompts, num_samples=options.pool, split=options.split)
    specs, left_out = _suitable(specs, pool) if options.estimators is None else (specs, [])

    times.append(time.perf_counter())
    projection = LinearProjection(module.policy, size=options.projection, seed=options.seed)
    with tqdm(total=pool.rewards.numel(), desc="Score vectors", unit=" rollouts", dynamic_ncols=True) as bar:
        score = partial(score_vectors, max_tokens=module.micro_batch_tokens, on_progress=bar.update)
        scores = [score(module.policy, batch, projection).unflatten(0, batch.rewards.shape) for batch in pool.batches]

    times.append(time.perf_counter())
    names = ("target_n", "group_sizes", "alpha", "seed")
    study = PolicyFidelity(pool.rewards, torch.cat(scores), **{name: getattr(options, name) for name in names})
    with tqdm(total=SPLITS * len(specs) * len(study.group_sizes), desc="Estimators", dynamic_ncols=True) as bar:
        ceiling, rows = study.run(specs, on_progress=bar.update)

    times.append(time.perf_counter())
    facts = [*_facts(options, module, pool, projection, study, times), *left_out]
    source = provenance(["diagnose", "gradients", *args], seed=options.seed)
    files = write_policy_fidelity(options.out, ceiling, rows, source, facts, target_n=options.target_n)
    write_rewards(options.out / "rewards.jsonl", pool)
    print("\n".join(f"- {fact}" for fact in facts))
    print(f"\n{ceiling_text(ceiling)}\n\n{policy_table(rows)}\n")
    for name, file in zip(("Page", "Figures", "Plot", "Rewards"), [*files, options.out / "rewards.jsonl"], strict=True):
        print(f"{name}: {file}")


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
    estimators_help = 'as in: tea "direct:tail=gpd,alpha=0.5" (default: every registered one that suits the rewards)'
    add("--estimators", nargs="+", metavar="NAME[:PARAMETER=VALUE,...]", help=estimators_help)
    add("--projection", type=int, default=16, help="K: each weight's gradient becomes K x K numbers (default: 16)")
    seed_help = "of projection, groups and bootstrap; rollouts have the config's (default: 0)"
    add("--seed", type=int, default=0, help=seed_help)
    add("--out", type=Path, default=Path("runs/diagnose_policy"), help="folder (default: runs/diagnose_policy)")
    return parser


def _check(options: argparse.Namespace, config_args: Sequence[str]) -> None:
    """Refuse before anything is sampled."""
    if not any(arg.partition("=")[0] in ("-c", "--config") for arg in config_args):
        raise UserError("diagnose gradients measures the policy of a config: add -c configs/quickstart.yaml.")
    at_least(2, m=min(options.group_sizes), N=options.target_n)
    at_least(2, "for an interval over prompts", prompts=options.prompts)
    at_least(1, projection=options.projection)
    needed = max(2 * options.target_n, 4 * max(options.group_sizes))
    at_least(needed, "each half needs N rollouts, and two groups of m", pool=options.pool)


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


def _facts(
    options: argparse.Namespace,
    module: PostTrainingModule,
    pool: RolloutPool,
    projection: LinearProjection,
    study: PolicyFidelity,
    times: Sequence[float],
) -> list[str]:
    """What was measured, in short sentences."""
    means = pool.rewards.nanmean(dim=1, keepdim=True)
    within = (pool.rewards - means).square().nanmean().sqrt()
    phases = ("rollouts", "score vectors", "estimators")
    seconds = [f"{name} {end - start:.0f}" for name, start, end in zip(phases, times, times[1:], strict=False)]
    return [
        f"policy: {module.policy_path}, {projection.covered:.0%} of its trainable parameters (its linear layers) "
        f"projected to {projection.num_features} numbers",
        f"pool: {len(pool.ids)} prompts ({options.split}) with {options.pool} rollouts, {int((~pool.valid).sum())} not "
        f"scored, halves of {study.half_size}; reward's standard deviation {within:.3g} within prompts, "
        f"{means.std():.3g} between",
        f"N = {options.target_n}, alpha = {options.alpha:g}",
        f"seconds: {', '.join(seconds)}",
    ]


# ---------------------------------------------------------------- the pool


def collect_pool(
    args: Sequence[str], *, num_prompts: int, num_samples: int, split: Literal["val", "test"] = "val"
) -> tuple[PostTrainingModule, RolloutPool]:
    """Sample and score `num_samples` rollouts of the split's first `num_prompts` prompts.

    It is a `tealightning validate ARGS` (or `test`) with `max(ns) = num_samples`: the same engine, reward, sampling and
    seeds. Loggers and the config's callbacks are left out, and a prompt is a batch.

    Args:
        args: Arguments of the config: `["-c", "configs/quickstart.yaml", "--rollout.engine=TransformersEngine"]`.
        num_prompts: Q.
        num_samples: M.
        split: Prompts of the config's data.

    Returns:
        The module, its policy on the device that it sampled on, and the pool.

    Raises:
        UserError: for a config that does not parse, a split with fewer prompts, or several devices.
    """
    command = _COMMANDS[split]
    overrides = [
        f"--model.ns=[{num_samples}]",
        f"--trainer.limit_val_batches={num_prompts}",
        f"--trainer.limit_test_batches={num_prompts}",
        "--trainer.logger=false",
        "--trainer.callbacks=null",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_model_summary=false",
    ]
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
    run = getattr(cli.trainer, command)
    run(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config[command]["ckpt_path"], verbose=False)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.close()
    return cli.model.to(device), pool_of(collector.batches)


class _BatchCollector(Callback):
    """Collects the batches of an evaluation, their rollouts on the CPU."""

    def __init__(self, split: Literal["val", "test"], num_prompts: int) -> None:
        self.split = split
        self.num_prompts = num_prompts
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
