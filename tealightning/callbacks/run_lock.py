"""Lock a run's folder for one process, before anything is loaded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import lightning.pytorch as pl

from tealightning.callbacks.folders import run_folder
from tealightning.locks import LOCK_FILE, locked

CHOOSING_SECONDS = 60.0
"""How long runs that start at once may take to choose their folders, all together."""


@contextmanager
def claimed_run_folder(trainer: pl.Trainer, *, is_resumed: bool) -> Iterator[None]:
    """Hold the folder that the trainer's run writes into, while the context lasts.

    Runs that start at once and number their folders themselves get different ones. Ranks but the first hold nothing:
    under `torchrun` they are processes of the same run. A trial run (`fast_dev_run`), or one that keeps nothing, has no
    folder to hold.

    Args:
        trainer: Built, and not running yet.
        is_resumed: Whether the run goes on from a checkpoint and may write where the other run wrote.

    Raises:
        ValueError: if the folder is another run's, one that lives or one that has ended, or cannot be written.
    """
    keeps = trainer.loggers or trainer.checkpoint_callbacks
    if not trainer.is_global_zero or trainer.fast_dev_run or not keeps:  # type: ignore[attr-defined] # as in folders.py
        yield
        return
    with ExitStack() as held:
        with _writable(), _choosing(trainer):
            folder = run_folder(trainer)
            in_use = f"{folder} is in use by a run. Wait until it ends, or let trainer.logger write elsewhere."
            held.enter_context(locked(folder, in_use))
        if trainer.loggers and not is_resumed:
            refuse_other_runs(folder / "config.yaml")
        yield


def refuse_other_runs(config: Path) -> None:
    """
    Raises:
        ValueError: if there is a run's config already.
    """
    if config.exists():
        raise ValueError(f"{config} is another run's. Let trainer.logger write elsewhere, or delete that folder.")


def refuse_live_run(folder: Path, own: Path) -> None:
    """A run that still lives is not to be gone on with.

    Args:
        folder: The run's.
        own: The folder that this process holds already.

    Raises:
        ValueError: if another process writes into `folder`.
    """
    if folder.resolve() == own.resolve() or not (folder / LOCK_FILE).exists():
        return
    told = f"{folder} is of a run that still goes on. Wait until it ends, or name a checkpoint to branch off from it."
    with locked(folder, f"--ckpt_path last: {told}"):
        pass


def _choosing(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """Be the only one that looks for the next free number and makes its folder."""
    root = getattr(trainer.logger, "root_dir", None)
    if root is None:
        return nullcontext()
    return locked(
        Path(root),
        f"Other runs have been choosing their folders in {root} for {CHOOSING_SECONDS:.0f} s.",
        wait_seconds=CHOOSING_SECONDS,
        name=".versions.lock",
    )


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The run's folder cannot be written: {error}. Let trainer.logger.save_dir (without a logger: "
            "trainer.default_root_dir) name a folder on a disk with space that you may write to."
        ) from error
