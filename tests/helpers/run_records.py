"""A callback that keeps what a run did, and runs of a few seconds on the tiny prose world."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from tealightning.training.policy_weights import is_sharded, whole

PROSE = Path(__file__).parents[2] / "configs" / "experiments" / "prose.yaml"


class RunRecord(Callback):
    """Prompts, sampled tokens and metrics of every step and validation of one rank.

    Args:
        folder: Where `<rank>.json` is written when training ends; None = nowhere.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.weights_before: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights_before = flat_weights(pl_module.policy)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens = [
            ids[:length].tolist()
            for ids, length in zip(batch.rollouts.completion_ids, batch.rollouts.completion_lengths, strict=True)
        ]
        self.steps.append({"ids": batch.ids, "tokens": tokens, "metrics": metrics_of(trainer)})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validations.append({"ids": [], "metrics": {}})

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validations[-1]["ids"] += batch.ids

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validations[-1]["metrics"] = metrics_of(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = flat_weights(pl_module.policy)
        if self.folder is not None:
            record = {
                "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
                "sharded": is_sharded(pl_module.policy),
                "weights": hashlib.sha256(self.weights.numpy().tobytes()).hexdigest(),
                "largest_move": self.largest_move,
                "steps": self.steps,
                "validations": self.validations,
            }
            target = Path(self.folder) / f"{trainer.global_rank}.json"
            target.write_text(json.dumps(record), encoding="utf-8")

    @property
    def largest_move(self) -> float:
        """The largest change of a weight."""
        return float((self.weights - self.weights_before).abs().max())

    def series(self, key: str) -> list[float]:
        """A metric's value at every step."""
        return [step["metrics"][key] for step in self.steps]


def flat_weights(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([whole(parameter.detach()).flatten().cpu() for parameter in policy.parameters()]).clone()


def metrics_of(trainer: pl.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def quickstart_args(command: str, playground: Path, out: Path, **trainer: Any) -> list[str]:
    """Arguments of a short run on the tiny prose world that writes to `out`; `trainer` overrides its settings.

    A few short samples and steps, no validation, no callbacks; overlay further settings behind them.
    """
    prompts = playground / "prompts"
    overlay = {
        "model": {"init_args": {"policy": str(playground / "policy"), "ns": [1, 4]}},
        "data": {
            "init_args": {
                **{phase: str(prompts / f"{phase}.jsonl") for phase in ("train", "val", "test")},
                "batch_size": 4,
            }
        },
        "rollout": {
            "reward": {"init_args": {"model": str(playground / "reward_model")}},
            "group_size": 8,
            "sampling": {"max_new_tokens": 12},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "val_check_interval": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(out), "name": "", "version": ""},
            },
            "callbacks": [],
        }
        | trainer,
    }
    file = out / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return [command, "-c", str(PROSE), "-c", str(file)]
