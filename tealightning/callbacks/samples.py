"""Log a table of sampled completions with their rewards."""

import json
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from tealightning.errors import UserError
from tealightning.reliability.files import append_lines, going_on_without, run_folder
from tealightning.types import PromptBatch

COLUMNS = ["phase", "step", "prompt_id", "prompt", "completion", "reward", "tokens", "truncated"]


class SampleTable(Callback):
    """Writes what the policy says: to `<run folder>/samples.jsonl`, and as a table to wandb or text to TensorBoard.

    Of each prompt the best, the median and the worst completion by reward are shown.

    Args:
        every_n_steps: Training batches between tables; the first batch of each validation is always shown.
        num_prompts: Prompts of a batch to show.
    """

    def __init__(self, every_n_steps: int = 10, num_prompts: int = 2) -> None:
        if every_n_steps < 1 or num_prompts < 1:
            raise UserError(f"every_n_steps and num_prompts must be at least 1, got {every_n_steps} and {num_prompts}.")
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx % self.every_n_steps == 0:
            self._show(trainer, batch, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._show(trainer, batch, "val")

    def _show(self, trainer: pl.Trainer, batch: PromptBatch, phase: str) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or batch.rollouts is None:
            return
        rows = table_rows(batch, phase=phase, step=trainer.global_step, num_prompts=self.num_prompts)
        with going_on_without(f"sampled completions to {folder / 'samples.jsonl'}; these are lost"):
            append_lines(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # wandb
                values = [[row[c] for c in COLUMNS] for row in rows]
                logger.log_table(f"samples/{phase}", columns=COLUMNS, data=values, step=trainer.global_step)
            elif add_text := getattr(getattr(logger, "experiment", None), "add_text", None):  # TensorBoard
                add_text(f"samples/{phase}", _markdown(rows), trainer.global_step)


def table_rows(batch: PromptBatch, *, phase: str, step: int, num_prompts: int) -> list[dict[str, Any]]:
    """Best, median and worst completion (by reward; unscorable ones last) of the first prompts of the batch."""
    rollouts = batch.rollouts
    assert rollouts is not None
    rows = []
    for p in range(min(num_prompts, len(batch))):
        rewards = rollouts.rewards[p].nan_to_num(nan=float("-inf"), posinf=float("-inf"))
        order = rewards.argsort(descending=True).tolist()
        for i in dict.fromkeys([order[0], order[len(order) // 2], order[-1]]):
            row = p * rollouts.group_size + i
            rows.append(
                {
                    "phase": phase,
                    "step": step,
                    "prompt_id": batch.ids[p],
                    "prompt": batch.prompts[p] if isinstance(batch.prompts[p], str) else json.dumps(batch.prompts[p]),
                    "completion": rollouts.completions[row],
                    "reward": float(rollouts.rewards[p, i]) if rollouts.valid[p, i] else None,
                    "tokens": int(rollouts.completion_lengths[row]),
                    "truncated": bool(rollouts.truncated[row]),
                }
            )
    return rows


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| prompt | completion | reward |", "|---|---|---|"]
    for row in rows:
        cells = [str(row[c]).replace("|", "\\|").replace("\n", " ") for c in ("prompt", "completion", "reward")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
