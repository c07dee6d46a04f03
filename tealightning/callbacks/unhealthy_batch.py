"""Save a batch that could not be trained on: tensors as safetensors, the rest as JSON."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tealightning.reliability.files import write_whole
from tealightning.training.nonfinite import SkippedStep
from tealightning.types import PromptBatch, RolloutBatch


def save_unhealthy_batch(folder: Path, batch: PromptBatch, skipped: SkippedStep, *, step: int, rank: int) -> None:
    """Write `step_<step>_rank_<rank>.json` and `.safetensors` to `folder`. A disk that takes nothing is warned about:
    the run has not failed yet.

    Args:
        batch: With rollouts, this rank's.
        step: Batches of prompts before this one.
    """
    assert batch.rollouts is not None, "a step that was skipped had rollouts"
    name = f"step_{step}_rank_{rank}"
    try:
        write_whole(folder / f"{name}.safetensors", save(_tensors(batch.rollouts, skipped)))
        described = _described(batch, batch.rollouts, skipped) | {"step": step, "rank": rank}
        write_whole(folder / f"{name}.json", json.dumps(described, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        warnings.warn(f"The batch of a skipped step could not be saved: {error}.", stacklevel=2)


def _tensors(rollouts: RolloutBatch, skipped: SkippedStep) -> dict[str, Tensor]:
    tensors = {
        "prompt_ids": rollouts.prompt_ids,
        "prompt_lengths": rollouts.prompt_lengths,
        "completion_ids": rollouts.completion_ids,
        "completion_lengths": rollouts.completion_lengths,
        "rollout_log_probs": rollouts.rollout_log_probs,
        "policy_log_probs": skipped.policy_log_probs,
        "rewards": rollouts.rewards,
        "advantages": skipped.advantages,
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _described(batch: PromptBatch, rollouts: RolloutBatch, skipped: SkippedStep) -> dict[str, Any]:
    m = rollouts.group_size
    rewards, advantages = rollouts.rewards.tolist(), skipped.advantages.tolist()
    return {
        "weights_version": rollouts.weights_version,
        "inner_epoch": skipped.inner_epoch,
        "loss": _number(skipped.loss),
        "kl": _number(skipped.kl),
        "grad_norm": _number(skipped.grad_norm),
        "parameters_with_a_gradient_that_is_not_finite": skipped.parameters,
        "prompts": [
            {
                "id": batch.ids[p],
                "prompt": batch.prompts[p],
                "completions": rollouts.completions[p * m : (p + 1) * m],
                "rewards": [_number(value) for value in rewards[p]],
                "advantages": [_number(value) for value in advantages[p]],
            }
            for p in range(len(batch))
        ],
    }


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: these are text."""
    return value if math.isfinite(value) else str(value)
