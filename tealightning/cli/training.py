"""`fit`, `validate` and `test`: LightningCLI in subclass mode, with a `rollout` section and short error messages."""

import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from tealightning.callbacks import BestOfNReport, RolloutCallback
from tealightning.cli.names import canonical_args, shorten_error
from tealightning.data import PromptDataModule
from tealightning.module import PostTrainingModule
from tealightning.registry import did_you_mean

COMMANDS = ("fit", "validate", "test")


class _Parser(LightningArgumentParser):
    """Ends with one short message instead of usage and a nested parse trace."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        print(f"tealightning: error: {shorten_error(message)}", file=sys.stderr)
        raise SystemExit(2)


class TrainingCLI(LightningCLI):
    """LightningCLI plus the `rollout` section (engine, reward, group size, sampling)."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutCallback, "rollout")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: arguments for name, arguments in LightningCLI.subcommands().items() if name in COMMANDS}

    def after_fit(self) -> None:
        """Complete a best-of-n report whose last validation is older than the last optimizer step."""
        for report in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(report, BestOfNReport) and report.is_behind(self.trainer.global_step):
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
                report.show(self.trainer, self.model)


def run_training(command: str, args: Sequence[str]) -> None:
    """Parse and run `tealightning COMMAND ARGS`.

    Raises:
        ValueError: for an unknown command.
        SystemExit: with status 2 for a config that does not parse.
    """
    if command not in COMMANDS:
        raise ValueError(
            f"Unknown command {command!r}.{did_you_mean(command, [*COMMANDS, 'playground', 'estimators'])}"
        )
    torch.set_float32_matmul_precision("high")
    TrainingCLI(
        PostTrainingModule,
        PromptDataModule,
        trainer_class=pl.Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=_Parser,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_kwargs={"allow_abbrev": False} | {name: {"allow_abbrev": False} for name in COMMANDS},
        args=[command, *canonical_args(args)],
    )
