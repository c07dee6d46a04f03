"""Record every evaluation prompt by prompt and sample by sample, for comparisons between runs."""

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tealightning.errors import UserError
from tealightning.functional.diversity import distinct_n, self_similarity
from tealightning.functional.losses import kl_estimate
from tealightning.pretrained import load_policy
from tealightning.reliability.files import going_on_without, run_folder, write_whole
from tealightning.rewards.base import Reward, checked_scores
from tealightning.training.policy_weights import is_sharded
from tealightning.types import PromptBatch, RolloutBatch

FOLDER = "evaluations"


class EvaluationRecord(Callback):
    """Writes `evaluations/<val|test>_<optimizer step>.npz` into the run's folder after every validation and test.

    The arrays of a file, a row for each of Q prompts:

    - `keys` [Q] int64, the prompt (`PromptBatch.keys`);
    - `rewards` [Q, M] float64 of all samples, NaN = could not be scored; `gold` [Q, M] likewise, with a gold reward;
    - `lengths` [Q, M] int64 tokens, `truncated` [Q, M] bool;
    - `kl` [Q] float64, KL of the policy to the reference in nats a completion (the mean over samples of the sum over
      tokens of k3, Schulman 2020), and `kl_per_token` [Q]; neither with `kl_samples=0`;
    - `distinct_1`, `distinct_2`, `self_similarity` [Q] of the first `diversity_samples` samples of a prompt.

    Every rank writes the prompts that it had (to `<val|test>_<step>.rank<r>.npz` from rank 1 on). What the disk refuses
    is kept in memory and written with the next evaluation, or when the run ends; if that fails too, the run fails,
    because an evaluation of weights that have moved on cannot be had again.

    Args:
        gold: A second reward that is measured only, never trained on: does what the policy learns carry over?
        kl_samples: Samples a prompt that the reference scores as well.
        diversity_samples: Samples a prompt that are compared with each other.
    """

    def __init__(self, *, gold: Reward | None = None, kl_samples: int = 16, diversity_samples: int = 16) -> None:
        if kl_samples < 0 or diversity_samples < 2:
            given = f"{kl_samples} and {diversity_samples}"
            raise UserError(f"kl_samples must be at least 0 and diversity_samples at least 2, got {given}.")
        self.gold = gold
        self.kl_samples = kl_samples
        self.diversity_samples = diversity_samples
        self.last_step: dict[str, int] = {}  # phase -> optimizer step of the last record
        self._reference: Any = None
        self._rows: list[dict[str, np.ndarray]] = []
        self._unwritten: dict[Path, dict[str, np.ndarray]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.gold is not None:
            self.gold.setup(trainer.strategy.root_device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_sharded(pl_module.policy):  # ranks can only call it together
            raise UserError("EvaluationRecord cannot score with a sharded policy: use trainer.strategy=ddp or auto.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()
        try:
            self._save()
        except OSError as error:
            names = ", ".join(path.name for path in self._unwritten)
            advice = "Free space on that disk and go on from the last checkpoint."
            raise UserError(f"Evaluations could not be written: {names} ({error}). {advice}") from error

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()
        with going_on_without("the last evaluations"):
            self._save()

    def _close(self) -> None:
        self._reference = None
        if self.gold is not None:
            self.gold.close()

    def is_behind(self, phase: str, global_step: int) -> bool:
        """True if there is no record of `phase` at this optimizer step."""
        return self.last_step.get(phase) != global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._rows = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any) -> None:
        self._rows.append(self._measure(pl_module, batch))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return  # a glance at a few batches is no evaluation
        phase, folder = "test" if trainer.testing else "val", run_folder(trainer) / FOLDER
        if self._rows:
            rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
            arrays = {key: np.concatenate([rows[key] for rows in self._rows]) for key in self._rows[0]}
            self._unwritten[folder / f"{phase}_{trainer.global_step:06d}{rank}.npz"] = arrays
            with going_on_without(f"an evaluation to {folder}; it is kept in memory until that works"):
                self._save()
        self._rows = []
        if not self._unwritten:
            self.last_step[phase] = trainer.global_step

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _save(self) -> None:
        for path in list(self._unwritten):
            save_arrays(path, self._unwritten[path])
            del self._unwritten[path]

    @torch.no_grad()
    def _measure(self, pl_module: Any, batch: PromptBatch) -> dict[str, np.ndarray]:
        rollouts = batch.attached_rollouts
        size, m = shape = tuple(rollouts.rewards.shape)
        measured: dict[str, Tensor] = {
            "keys": batch.keys,
            "rewards": rollouts.rewards,
            "lengths": rollouts.completion_lengths.view(shape),
            "truncated": rollouts.truncated.view(shape),
        }
        if self.gold is not None:
            prompts = [prompt for prompt in batch.prompts for _ in range(m)]
            metadata = [row for row in batch.metadata for _ in range(m)]
            measured["gold"] = checked_scores(self.gold, prompts, rollouts.completions, metadata).total.view(shape)
        if self.kl_samples:
            kl, tokens = self._kl(pl_module, rollouts)
            measured |= {"kl": kl.mean(dim=1), "kl_per_token": kl.sum(dim=1) / tokens.sum(dim=1)}
        ids, lengths = rollouts.completion_ids.cpu(), rollouts.completion_lengths.tolist()
        firsts = [range(p * m, p * m + min(self.diversity_samples, m)) for p in range(size)]
        groups = [[ids[row, : lengths[row]].tolist() for row in rows] for rows in firsts]
        measured |= {f"distinct_{n}": distinct_n(groups, n) for n in (1, 2)}
        measured["self_similarity"] = self_similarity(groups)
        return {key: value.cpu().numpy() for key, value in measured.items()}

    def _kl(self, pl_module: Any, rollouts: RolloutBatch) -> tuple[Tensor, Tensor]:
        """KL to the reference in nats and tokens, both [P, kl_samples], of the first samples of each prompt. The
        reference is what the module trains against, or the policy as it was loaded."""
        self._reference = self._reference or pl_module.reference
        if self._reference is None:
            loaded = load_policy(pl_module.reference_path, argument="reference", **pl_module.load_kwargs)
            self._reference = loaded.to(pl_module.device)
        prompts, m = rollouts.rewards.shape
        rows = torch.arange(prompts * m, device=rollouts.rewards.device).view(prompts, m)[:, : self.kl_samples]
        ref_log_probs = pl_module.frozen_log_probs(self._reference, rollouts, rows.flatten())
        log_ratio = (rollouts.rollout_log_probs - ref_log_probs).double()
        kl = torch.where(rollouts.completion_mask, kl_estimate(log_ratio, "k3"), 0.0).sum(dim=1)
        return kl[rows], rollouts.completion_lengths[rows].double()

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = dict(state_dict["last_step"])


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz that is there whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_whole(path, content.getvalue())
