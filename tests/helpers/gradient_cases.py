"""Batches that two ranks share unequally, and what training on them gives; run as a script, it is one rank.

Each case: the rewards of each rank's groups, and the module's settings.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from module_fixtures import make_batch, make_rollouts, run_steps

from tealightning import PolicyGradientLoss, PostTrainingModule
from tealightning.estimators import build_estimator
from tealightning.training.policy_weights import is_sharded, whole
from tealightning.types import RolloutBatch

NAN = math.nan
SPREAD = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
FLAT = [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
UNSCORED = [[NAN] * 4, [NAN] * 4]
HALF_FLAT = [[1.0, 1.0, 1.0, 1.0], [0.5, -2.0, 1.0, 4.0]]
RAGGED = [[NAN, -1.0, NAN, 4.0], [0.5, NAN, 2.0, 3.0]]
TAIL = {"estimator": "tea", "target_n": 8, "alpha": 0.75}
BATCH_RMS = {"advantage_scale": "batch_rms"}

CASES: dict[str, tuple[list[list[list[float]]], dict[str, Any]]] = {
    "token mean": ([SPREAD, RAGGED], {}),
    "sequence mean": ([SPREAD, RAGGED], {"loss": {"reduction": "sequence_mean"}}),
    "constant": ([SPREAD, RAGGED], {"loss": {"reduction": "constant"}}),
    "batch rms": ([SPREAD, RAGGED], BATCH_RMS),
    "one group against two": ([SPREAD[:1], RAGGED], BATCH_RMS),
    "tea skips": ([SPREAD, RAGGED], TAIL),
    "tea skips more on rank 0": ([HALF_FLAT, SPREAD], TAIL | BATCH_RMS),
    "direct skips more on rank 1": ([SPREAD, HALF_FLAT], {"estimator": "direct", "target_n": 8, "alpha": 0.75}),
    "micro-batches": ([SPREAD, HALF_FLAT], TAIL | {"micro_batch_size": 1}),
    "micro-batches by tokens": ([SPREAD, RAGGED], {"micro_batch_tokens": 20}),
    "rank 0 has nothing": ([FLAT, SPREAD], BATCH_RMS),
    "rank 1 has nothing": ([SPREAD, UNSCORED], {"micro_batch_size": 2}),
    "sequence mean, rank 1 has nothing": ([SPREAD, FLAT], {"loss": {"reduction": "sequence_mean"}} | BATCH_RMS),
    "neither has anything": ([FLAT, UNSCORED], BATCH_RMS),
    "inner epochs and KL": (
        [SPREAD, UNSCORED],
        {"inner_epochs": 2, "loss": {"kl_coef": 0.1}, "lr": 0.05, "micro_batch_size": 3},
    ),
    "importance by tokens": (
        [SPREAD, RAGGED],
        {"loss": {"importance_cap": 2.0, "importance_mode": "token_mask"}, "micro_batch_size": 3},
    ),
    "importance by sequences": (
        [SPREAD, RAGGED],
        {"loss": {"importance_cap": 2.0, "importance_mode": "sequence_mask", "reduction": "sequence_mean"}},
    ),
    "gradient checkpointing": ([SPREAD, RAGGED], {"gradient_checkpointing": True, "micro_batch_size": 3}),
}


def module_of(policy: str, settings: dict[str, Any]) -> PostTrainingModule:
    settings = {"estimator": "grpo", "advantage_scale": "none", "lr": 0.01, "loss": {}} | settings
    estimator = {key: settings.pop(key) for key in ("target_n", "alpha") if key in settings}
    lr = settings.pop("lr")
    return PostTrainingModule(
        policy=policy,
        estimator=build_estimator(settings.pop("estimator"), **estimator),
        loss=PolicyGradientLoss(**settings.pop("loss")),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        gradient_clip_norm=None,
        **settings,
    )


def rollouts_of(case: str, rank: int | None = None) -> RolloutBatch:
    """The whole batch of a case, or a rank's share of it, as short as its own longest completion."""
    shares, _ = CASES[case]
    whole = make_rollouts([group for share in shares for group in share])
    if case.startswith("importance"):
        whole.rollout_log_probs = whole.rollout_log_probs - math.log(32)  # an engine that draws any token
    if rank is None:
        return whole
    first = sum(len(share) for share in shares[:rank])
    last = first + len(shares[rank])
    m = whole.group_size
    rows = slice(first * m, last * m)
    length = int(whole.completion_lengths[rows].max())
    return replace(
        whole,
        prompt_ids=whole.prompt_ids[rows],
        prompt_lengths=whole.prompt_lengths[rows],
        completion_ids=whole.completion_ids[rows, :length],
        completion_lengths=whole.completion_lengths[rows],
        rollout_log_probs=whole.rollout_log_probs[rows, :length],
        truncated=whole.truncated[rows],
        rewards=whole.rewards[first:last],
        completions=whole.completions[rows],
    )


def flat(tensors: Any) -> torch.Tensor:
    """All values, of sharded tensors too."""
    return torch.cat([whole(tensor).detach().flatten() for tensor in tensors])


def train(policy: str, case: str, *, rank: int | None = None, **trainer_kwargs: Any) -> dict[str, Any]:
    """One training step of a case: gradients of each optimizer step, weights after it, and metrics."""
    module = module_of(policy, CASES[case][1])
    trainer, gradients = run_steps(module, [make_batch(rollouts_of(case, rank))], **trainer_kwargs)
    return {
        "gradients": gradients,
        "weights": flat(module.policy.parameters()),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "world_size": trainer.world_size,
        "sharded": is_sharded(module.policy),
    }


def strategy_of(name: str) -> Any:
    return name if name == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def main(policy: str, folder: str, strategy: str) -> None:
    import os

    rank = int(os.environ["LOCAL_RANK"])
    results = {case: train(policy, case, rank=rank, strategy=strategy_of(strategy), devices=2) for case in CASES}
    torch.save(results, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
