"""Commands `fit`, `validate` and `test`: LightningCLI with a `rollout` section and short error messages."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from tealightning.callbacks import BestOfNReport, Deadlines, HealthChecks, ResumableCheckpoint, RolloutCallback
from tealightning.callbacks.screen import RunProgressBar, RunSummary
from tealightning.cli.console import log_to_current_stderr, quiet_transformers
from tealightning.cli.error_messages import naming_settings, parse_error
from tealightning.cli.preflight import check_classes, check_inputs, check_together
from tealightning.cli.resume import command_to_go_on, last_checkpoint
from tealightning.cli.user_settings import canonical_args, canonical_settings, with_estimator_defaults
from tealightning.data import PromptDataModule
from tealightning.errors import UserError
from tealightning.reliability.checkpoint_files import VerifiedCheckpointIO, warn_of_pickles
from tealightning.reliability.files import DurableCSVLogger, run_folder, write_whole
from tealightning.reliability.locks import claimed_run_folder, refuse_live_run, refuse_other_runs
from tealightning.strict_yaml import load_yaml
from tealightning.training.module import PostTrainingModule

COMMANDS = {
    "fit": "Train a policy.",
    "validate": "Best-of-n on the validation prompts.",
    "test": "Best-of-n on the test prompts.",
}

_HELP = """ Sections: trainer (Lightning's), model (policy, estimator, loss, optimizer), data (prompts), rollout
(engine, reward, group size, sampling), checkpoint (how often, how many), health (what is watched for), deadlines (what
ends a run that hangs). Arguments of a class: --model.help, --data.help, --model.estimator.help tea,
--model.optimizer.help AdamW, --rollout.engine.help vllm_engine, --rollout.reward.help function_reward. What a command
line amounts to: --print_config."""


class _Refused(SystemExit):
    """A command line that does not parse, with the parser's message; no parser around this one catches and wraps it."""


class _Parser(LightningArgumentParser):
    """Takes registered names in config files, and ends with the bare message instead of usage and message."""

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        name = str(path) or "config"
        settings = {} if (document := load_yaml(content, name)) is None else document
        mappings = {name: settings}
        if isinstance(settings, dict):
            sections = ("trainer", "rollout", "checkpoint", "health", "deadlines")
            mappings |= {f"{name}: {section}": settings.get(section, {}) for section in sections}
        for where, value in mappings.items():
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected settings, `name: value`, got {str(value)[:60]!r}.")
        canonical = canonical_settings(settings)
        # The text as it is where nothing was renamed: YAML dialects differ in numbers such as 1e-3.
        text = content if canonical == settings and settings else yaml.safe_dump(canonical)
        return super().parse_string(text, path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        raise _Refused(message) from ex


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved config into the run's own folder, whatever the logger; without one there is no such folder."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers:
            return
        file = run_folder(trainer) / self.config_filename  # the ranks agree on it: all of them have to ask
        if self.already_saved or not trainer.is_global_zero:
            return
        if stage != "fit" or self.config.get("ckpt_path") is None:
            refuse_other_runs(file)
        write_whole(file, self.parser.dump(self.config, skip_none=False).encode())
        self.already_saved = True


class TrainingCLI(LightningCLI):
    """LightningCLI plus the sections `rollout` (engine, reward, group size, sampling), `checkpoint`, `health` and
    `deadlines`. It builds everything; `start` runs the command.

    `given` is the whole command line, for the command to go on that a run which is stopped prints.
    """

    def __init__(self, *args: Any, command: str, given: Sequence[str], **kwargs: Any) -> None:
        self.command = command
        self.given = given
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Deadlines, "deadlines")
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_class_arguments(ResumableCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HealthChecks, "health")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With checkpoints from which a run can go on, unless they are off, their files verified in any case, a bar and
        a line about the model that leave the screen to results, and CSV loggers that lose nothing."""
        settings = self._get(self.config_init, "trainer")
        lists = [settings.get(name) or [] for name in ("callbacks", "plugins")]
        callbacks, plugins = ([*value] if isinstance(value, list | tuple) else [value] for value in lists)
        if settings.get("enable_checkpointing") is not False and not settings.get("fast_dev_run"):
            checkpoint = self._get(self.config_init, "checkpoint")
            checkpoint.resume_command = command_to_go_on(self.given)
            callbacks.append(checkpoint)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(VerifiedCheckpointIO())

        def wants(setting: str, kind: type) -> bool:
            is_off = settings.get(setting) is False or settings.get("barebones")
            return not is_off and not any(isinstance(callback, kind) for callback in callbacks)

        if wants("enable_progress_bar", ProgressBar):
            callbacks.append(RunProgressBar())
        if wants("enable_model_summary", ModelSummary):
            callbacks.append(RunSummary())
            kwargs["enable_model_summary"] = False  # Lightning would tell that it adds none
        trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        for logger in trainer.loggers:
            if type(logger) is CSVLogger:
                logger.__class__ = DurableCSVLogger
        return trainer

    def before_fit(self) -> None:
        """Refuse what cannot work before anything is loaded, the cheap checks first."""
        check_together(self)
        if self.resolved.get("ckpt_path") == "last":
            settings = yaml.safe_load(self.parser.dump(self.config))[self.command]
            path = last_checkpoint(self.trainer, settings, self.command, self._refuse_live)
            self.resolved["ckpt_path"] = self.config_init[self.command]["ckpt_path"] = path
        if (chosen := self._get(self.config_init, "ckpt_path")) is not None:
            warn_of_pickles(chosen)
        check_inputs(self)

    before_validate = before_test = before_fit

    def _refuse_live(self, folder: Path) -> None:
        """Of a run: `fit` goes on with it only once it has ended."""
        if self.command == "fit" and self.trainer.is_global_zero:
            refuse_live_run(folder, run_folder(self.trainer))

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that runs, with what its parser leaves out: a parser of every command would triple the time."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.resolved = self.config[self.command]
        self.naming = functools.partial(naming_settings, self.resolved, args[1:])
        seed = self.resolved.seed_everything
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}.")
        check_classes(self.resolved)

    def instantiate_classes(self) -> None:
        """Build everything; an error of a constructor names the whole key of the setting."""
        with self.naming():
            super().instantiate_classes()

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would load the whole checkpoint to look for hyperparameters, and there are none in it."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: LightningCLI calls it when everything is built, and `start` is for the caller to call."""

    def start(self) -> None:
        """Run the command."""
        is_resumed = self.command == "fit" and self._get(self.config_init, "ckpt_path") is not None
        with claimed_run_folder(self.trainer, is_resumed=is_resumed):
            super()._run_subcommand(self.command)

    def after_fit(self) -> None:
        """Make up for a last validation that was cut off, or that a best-of-n report lacks."""
        for checkpoint in self.trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ResumableCheckpoint) and checkpoint.validation_due:
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        for report in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(report, BestOfNReport) and report.is_behind(self.trainer.global_step):
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
                report.show(self.trainer, self.model)


def build_training(command: str, args: Sequence[str], given: Sequence[str] = ()) -> TrainingCLI:
    """`trainer`, `model`, `datamodule` and `config` of `tealightning COMMAND ARGS`, built and not started.

    `given` is the command line as the user gave it, with the options that are not in `args`.
    """
    quiet_transformers()
    log_to_current_stderr()
    torch.set_float32_matmul_precision("high")
    usage = f"tealightning {command} [-c CONFIG]... [--setting=value]..."
    try:
        return TrainingCLI(
            PostTrainingModule,
            PromptDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            parser_class=_Parser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={
                "allow_abbrev": False,
                command: {"allow_abbrev": False, "usage": usage, "description": COMMANDS[command] + _HELP},
            },
            command=command,
            args=[command, *with_estimator_defaults(canonical_args(args))],
            given=given or [command, *args],
        )
    except _Refused as refused:
        raise parse_error(str(refused), args) from None
