"""What a run shows on the screen: a progress bar that ends before results are printed, and a line about the model."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import Task, TextColumn
from rich.text import Text


class RunProgressBar(RichProgressBar):
    """Lightning's progress bar with the run's steps. It stops where training or evaluation does, so that results,
    warnings and errors stand below it."""

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        _, *others, _speed = super().configure_columns(trainer)  # of batches, which the times say as well
        return [_Description("{task.description}"), *others]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        logged = super().get_metrics(trainer, pl_module)
        logged.pop("v_num", None)  # the number of the run's folder, which Lightning shows as 0.000
        return ({"step": f"{trainer.global_step}/{trainer.max_steps}"} if trainer.max_steps > 0 else {}) | logged

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        stop_bar(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            stop_bar(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        stop_bar(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.progress is not None and self.progress.live.is_started:  # stopped again it would write an empty line
            super().teardown(trainer, pl_module, stage)


class _Description(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description.replace("/-2", ""))  # "Epoch 0/-2": Lightning's last epoch of max_epochs=-1


class RunSummary(ModelSummary):
    """A line about the model: its parts that have parameters, and how many of these are trained."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        columns = dict(summary_data)
        parts = zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
        named = ", ".join(f"{name} {kind}" for name, kind, size in parts if size.strip() != "0")
        total, trained = (get_human_readable_count(int(n)).strip() for n in (total_parameters, trainable_parameters))
        rank_zero_info(f"Model: {named}, {trained} of {total} parameters trained")


def stop_bar(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Leave a bar of rich as it is, so that what is printed from here on stands below it. It would otherwise stay the
    last line until the very end; the next stage starts a new one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.progress.live.is_started:
        bar.teardown(trainer, pl_module, str(trainer.state.fn))
