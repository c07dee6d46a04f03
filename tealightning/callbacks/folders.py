"""Where callbacks write."""

from pathlib import Path

import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's own folder: the first logger's, else the trainer's root. Collective under DDP: call it on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)
