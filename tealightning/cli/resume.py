"""Resolve `--ckpt_path last`: the newest good checkpoint of a configuration's runs."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.cli.user_settings import flat_settings
from tealightning.errors import UserError
from tealightning.reliability.checkpoint_files import checkpoints, newest_good

_COMPARED = {
    "fit": ("model", "data", "rollout.group_size", "rollout.sampling", "rollout.steps_ahead", "seed_everything"),
    "validate": ("model.policy", "model.lora"),
    "test": ("model.policy", "model.lora"),
}
"""Settings in which a run must be the same for its checkpoint to be this configuration's: those that say what is
trained on what. Engine and reward are not among them: a run that they have ended may go on with other memory limits,
timeouts or servers."""
_FREE = {f"model.{name}" for name in ("micro_batch_tokens", "micro_batch_size", "gradient_checkpointing")}
"""Memory and speed, for a run that has ended for want of them."""


def command_to_go_on(given: Sequence[str]) -> str:
    """The command line `tealightning GIVEN`, with the newest checkpoint to start from."""
    option = "--ckpt_path"
    pairs = zip(["", *given], given, strict=False)
    args = [arg for before, arg in pairs if option not in (before, arg.partition("=")[0])]
    return shlex.join(["tealightning", *args, option, "last"])


def last_checkpoint(
    trainer: pl.Trainer, settings: dict[str, Any], command: str, refuse_live: Callable[[Path], None] = lambda run: None
) -> str | None:
    """The newest checkpoint that is whole, of the newest run of this configuration (the resolved `settings`) that has
    one; None for a `fit` of which there is no checkpoint at all: it begins.

    `refuse_live` is called with the folder of the run that would be gone on with, and raises if it still lives.
    """
    damaged: list[str] = []
    others: list[str] = []
    for folder in _checkpoint_folders(trainer, settings):
        if not checkpoints(folder):
            continue
        if differences := _differences(folder.parent / "config.yaml", settings, _COMPARED[command]):
            others.append(f"{folder} is of a run with another {', '.join(differences)}")
            continue
        refuse_live(folder.parent)  # before its files are read: it would replace them meanwhile
        before = len(damaged)
        path = newest_good(folder, damaged.append)
        for sentence in damaged[before:]:
            rank_zero_warn(sentence)
        if path is not None:
            return str(path)
    if damaged or others or command != "fit":
        raise UserError(
            f"--ckpt_path last: there is no checkpoint to use. {' '.join(damaged)} {'; '.join(others)}".strip()
            + (". Give one's path to use it all the same, or leave --ckpt_path out to start anew." if others else "")
        )
    rank_zero_warn("--ckpt_path last: there is no checkpoint of this configuration yet, the run starts anew.")
    return None


def _checkpoint_folders(trainer: pl.Trainer, settings: dict[str, Any]) -> Iterator[Path]:
    """Where the runs of this configuration keep checkpoints, the newest run first."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            yield Path(callback.dirpath)
    if not trainer.loggers:
        yield Path(trainer.default_root_dir) / "checkpoints"
        return
    runs = Path(trainer.loggers[0].save_dir or trainer.default_root_dir) / str(trainer.loggers[0].name or "")
    logger = settings["trainer"].get("logger")
    first = logger[0] if isinstance(logger, list) and logger else logger
    version = first.get("init_args", {}).get("version") if isinstance(first, dict) else None
    if version is not None:  # else each run gets a new one
        yield runs / (version if isinstance(version, str) else f"version_{version}") / "checkpoints"
    else:
        yield from sorted(runs.glob("*/checkpoints"), key=_age, reverse=True)


def _age(folder: Path) -> tuple[int, float]:
    """Loggers number the folders of runs; where they do not, the time decides."""
    number = re.fullmatch(r"version_(\d+)", folder.parent.name)
    return int(number[1]) if number else -1, folder.stat().st_mtime


def _differences(config: Path, settings: dict[str, Any], sections: tuple[str, ...]) -> list[str]:
    """Keys in `sections` whose values are others in a run's saved configuration; none if it has saved none."""
    if not config.is_file():
        return []
    documents = yaml.safe_load(config.read_text(encoding="utf-8")), settings
    saved, own = ({setting.key: setting.value for setting in flat_settings("", document, "")} for document in documents)
    keys = {key for key in {*saved, *own} - _FREE if key.startswith(sections)}
    groups = {key for values in (saved, own) for key in keys if isinstance(values.get(key), dict)}
    return sorted(key for key in keys - groups if saved.get(key) != own.get(key))
