"""What a run leaves to look at: best-of-n before and after, samples of what the policy says, the policy itself."""

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError

from tealightning.callbacks.evaluation_record import FOLDER as EVALUATIONS
from tealightning.callbacks.screen import stop_bar
from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts, paired_difference
from tealightning.reliability import files
from tealightning.types import Evaluation, PromptBatch


class BestOfNReport(Callback):
    """Keeps the first and the last validation of a run and writes `best_of_n.md`, `.csv` and `.png` into its folder,
    and the rewards behind them, `rewards_before.jsonl` and `rewards_after.jsonl`; prints the table when training ends.

    The first validation is Lightning's sanity check if `trainer.num_sanity_val_steps` is -1 (the whole split, before
    the first step). Both use the same prompts and sampling seeds; standard errors are over prompts. A run with a single
    validation has a table of that one, and no difference.
    """

    def __init__(self) -> None:
        self.before: Evaluation | None = None  # the first, or the only one
        self.after: Evaluation | None = None
        self._is_written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("BestOfNReport draws a curve and needs matplotlib: pip install matplotlib.")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return  # a glance at a few batches is no evaluation
        keys, rewards = pl_module.best_of_n["val"].pooled()
        evaluation = Evaluation(step=trainer.global_step, keys=keys.cpu(), rewards=rewards.cpu())
        folder = files.run_folder(trainer)
        if self.before is None or (self.after is None and self.before.step == evaluation.step):
            self.before = evaluation
            return
        self.after = evaluation
        if trainer.is_global_zero:
            self.write(folder, pl_module.ns)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.is_behind(trainer.global_step):
            self.show(trainer, pl_module)

    def is_behind(self, global_step: int) -> bool:
        """True if an optimizer step was made since the last evaluation."""
        last = self.after or self.before
        return last is None or last.step != global_step

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The evaluations by their column: a single one is `before` if no step was made until then, else `after`."""
        if self.before is None:
            return {}
        if self.after is None:
            return {"after" if self.before.step else "before": self.before}
        return {"before": self.before, "after": self.after}

    def show(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print the table and where table and curve lie."""
        stop_bar(trainer, pl_module)
        folder = files.run_folder(trainer)
        if len(self.evaluations) < 2:
            rank_zero_warn("No best-of-n comparison: set trainer.num_sanity_val_steps=-1 to evaluate before training.")
        if not self.evaluations:
            return
        if trainer.is_global_zero and not self._is_written:
            self.write(folder, pl_module.ns)
        written = f"Table: {folder / 'best_of_n.md'}\nCurve: {folder / 'best_of_n.png'}"
        when = {"before": "before training", "after": "after"} if self.after else {"after": "after training"}
        told = " and ".join(f"{when.get(name, name)} (step {e.step})" for name, e in self.evaluations.items())
        rank_zero_info(
            f"\nBest-of-n reward on {len(next(iter(self.evaluations.values())).keys)} validation prompts, "
            f"{max(pl_module.ns)} samples each, {told}; ± standard error over prompts\n\n{self.table(pl_module.ns)}\n\n"
            f"{written if self._is_written else f'Not written to {folder}.'}"
        )

    def rows(self, ns: list[int]) -> list[dict[str, float]]:
        """One row for each n: before, after and difference, each with its standard error; of a single evaluation its
        own column alone."""
        values = {name: best_of_n(e.rewards, ns, ~e.rewards.isnan()) for name, e in self.evaluations.items()}
        columns = {name: mean_over_prompts(value) for name, value in values.items()}
        if len(values) == 2:
            pair = ((e.keys, values[name]) for name, e in self.evaluations.items())
            columns["difference"] = paired_difference(*pair)
        rows: list[dict[str, float]] = [{"n": n} for n in ns]
        for index, row in enumerate(rows):
            for name, estimate in columns.items():
                row |= {name: float(estimate.mean[index]), f"{name}_se": float(estimate.standard_error[index])}
        return rows

    def table(self, ns: list[int]) -> str:
        """The rows as a markdown table."""
        rows = self.rows(ns)
        columns = [name for name in ("before", "after", "difference") if name in rows[0]]
        header = " | ".join(f"{name:<15}" for name in columns)
        lines = [f"|    n | {header} |", "|-----:|" + ("-" * 17 + "|") * len(columns)]
        for row in rows:
            cells = [f"{row[k]:.3f} ± {row[f'{k}_se']:.3f}" for k in columns]
            lines.append(f"| {row['n']:>4} | " + " | ".join(f"{c:<15}" for c in cells) + " |")
        return "\n".join(lines)

    def write(self, folder: Path, ns: list[int]) -> None:
        """Write table, curve and rewards; what the disk refuses is still the older one."""
        self._is_written = False
        rows = self.rows(ns)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        labels = {f"{name} (step {e.step})": name for name, e in self.evaluations.items()}
        contents = {"best_of_n.md": (self.table(ns) + "\n").encode(), "best_of_n.csv": table.getvalue().encode()}
        contents |= {f"rewards_{name}.jsonl": reward_lines(e).encode() for name, e in self.evaluations.items()}
        contents["best_of_n.png"] = best_of_n_plot(rows, labels)
        retried = "to be tried again at the next validation and the end"
        with files.going_on_without(f"the best-of-n report to {folder}; {retried}"):
            for name, data in contents.items():
                files.write_whole(folder / name, data)
            self._is_written = True

    def state_dict(self) -> dict[str, Any]:
        saved = {"before": self.before, "after": self.after}
        return {name: e and {"step": e.step, "keys": e.keys, "rewards": e.rewards} for name, e in saved.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, e in state_dict.items():
            setattr(self, name, e and Evaluation(step=e["step"], keys=e["keys"], rewards=e["rewards"]))


def reward_lines(evaluation: Evaluation) -> str:
    """One line a prompt, `{"key": int, "rewards": [scored samples]}`: what `tealightning diagnose tail` reads."""
    return "".join(
        json.dumps({"key": key, "rewards": rewards[~rewards.isnan()].tolist()}) + "\n"
        for key, rewards in zip(evaluation.keys.tolist(), evaluation.rewards, strict=True)
    )


def best_of_n_plot(rows: list[dict[str, float]], curves: dict[str, str]) -> bytes:
    """Best-of-n curves (label -> column) with bands of two standard errors on a log-n axis, as PNG. Rows have `n`, and
    `<column>` and `<column>_se` for each curve."""
    from matplotlib.figure import Figure  # not pyplot: no global backend is touched

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ns = [row["n"] for row in rows]
    for label, column in curves.items():
        values = torch.tensor([row[column] for row in rows])
        band = 2 * torch.tensor([row[f"{column}_se"] for row in rows])
        (line,) = axes.plot(ns, values, marker="o", label=label)
        axes.fill_between(ns, values - band, values + band, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.set_xlabel("n (samples a prompt, the best one kept)")
    axes.set_ylabel("best-of-n reward")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()


class SampleTable(Callback):
    """Writes what the policy says: to `<run folder>/samples.jsonl`, and as a table to wandb or text to TensorBoard.

    Args:
        every_n_steps: Training batches between tables; the first batch of each validation is always shown.
        num_prompts: Prompts of a batch to show, each with its best, median and worst completion by reward.
    """

    def __init__(self, every_n_steps: int = 10, num_prompts: int = 2) -> None:
        if every_n_steps < 1 or num_prompts < 1:
            raise UserError(f"every_n_steps and num_prompts must be at least 1, got {every_n_steps} and {num_prompts}.")
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        if trainer.fit_loop.total_batch_idx % self.every_n_steps == 0:
            self._show(trainer, batch, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int, *args: Any
    ) -> None:
        if batch_idx == 0:
            self._show(trainer, batch, "val")

    def _show(self, trainer: pl.Trainer, batch: PromptBatch, phase: str) -> None:
        file = files.run_folder(trainer) / "samples.jsonl"
        if not trainer.is_global_zero or batch.rollouts is None:
            return
        rows = table_rows(batch, phase=phase, step=trainer.global_step, num_prompts=self.num_prompts)
        with files.going_on_without(f"sampled completions to {file}; these are lost"):
            files.append_lines(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # wandb
                table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
                logger.log_table(f"samples/{phase}", step=trainer.global_step, **table)
            elif add_text := getattr(getattr(logger, "experiment", None), "add_text", None):  # TensorBoard
                add_text(f"samples/{phase}", _markdown(rows), trainer.global_step)


def table_rows(batch: PromptBatch, *, phase: str, step: int, num_prompts: int) -> list[dict[str, Any]]:
    """Best, median and worst completion (by reward; unscorable ones last) of the first prompts of the batch."""
    rollouts = batch.attached_rollouts
    rows = []
    for p, prompt in enumerate(batch.prompts[:num_prompts]):
        order = rollouts.rewards[p].nan_to_num(nan=float("-inf")).argsort(descending=True).tolist()
        for i in dict.fromkeys([order[0], order[len(order) // 2], order[-1]]):
            row = p * rollouts.group_size + i
            rows.append(
                {
                    "phase": phase,
                    "step": step,
                    "prompt_id": batch.ids[p],
                    "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt),
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


class ExportPolicy(Callback):
    """When training ends, writes `<run folder>/<folder>`: safetensors weights, config and tokenizer, as
    `AutoModelForCausalLM.from_pretrained` and vLLM load them. The folder is there once it is complete; until then an
    older one keeps its place."""

    def __init__(self, folder: str = "policy") -> None:
        parts = Path(folder).parts
        if not parts or ".." in parts or parts[0] in ("checkpoints", EVALUATIONS, "unhealthy"):
            raise UserError(f"folder must be one that holds nothing but the export, such as 'policy', got {folder!r}.")
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what could not be exported or not written, before anything is loaded."""
        if stage != "fit":
            return
        target = files.run_folder(trainer) / self.folder
        pl_module.try_export()
        if not trainer.is_global_zero:
            return
        if target.exists() and not (target / "config.json").is_file() and (target.is_file() or any(target.iterdir())):
            raise UserError(f"ExportPolicy.folder: {target} is there already and is no exported policy.")
        try:
            files.check_writable(target.parent)
        except OSError as error:
            raise UserError(f"ExportPolicy.folder: {target} cannot be written ({error}).") from error

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        stop_bar(trainer, pl_module)
        target = files.run_folder(trainer) / self.folder
        if not trainer.is_global_zero:
            pl_module.export(str(target))  # gathers the weights, writes nothing
            return
        try:
            with files.whole_folder(target) as new:
                pl_module.export(str(new))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The trained policy could not be written to {target}: {error}. Nothing of it is there, and an older "
                "one is as it was. Free space on that disk and go on from the last checkpoint: without steps left to "
                "train, that writes the policy."
            ) from error
        rank_zero_info(f"Trained policy: {target}")
