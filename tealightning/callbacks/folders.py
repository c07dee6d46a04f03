"""Folder of a run, where callbacks write."""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's own folder: the first logger's, else the trainer's root. Collective under DDP: call it on all ranks.

    Loggers that keep no folder of a run themselves, wandb for one, get `<save_dir>/<name>/<version>`, the place where
    Lightning puts their checkpoints. A trial run (`trainer.fast_dev_run`) gets one outside the working folder.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # set by Lightning's debugging connector
        return Path(tempfile.gettempdir()) / "tealightning_dev_run"
    root = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return root
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return root.joinpath(*trainer.strategy.broadcast(parts))
