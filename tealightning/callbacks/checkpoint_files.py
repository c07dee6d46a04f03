"""Checkpoints of a folder: names, the newest good one, removal of old ones."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.callbacks.checkpoint_io import DamagedCheckpointError, read_seal, seal_folder, verify
from tealightning.files import sync_folder

Report = Callable[[str], None]


def checkpoint_file(folder: Path, global_step: int) -> Path:
    """Where ResumableCheckpoint keeps the checkpoint of an optimizer step."""
    return folder / f"step={global_step:06d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """All in the folder, of the highest optimizer step first."""
    found = [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), _modified(path)), reverse=True)


def _modified(path: Path) -> float:
    """0 if it has been removed meanwhile: a live run removes its older ones."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def newest_good(folder: Path, damaged: Report) -> Path | None:
    """The checkpoint of the highest optimizer step that is what was written and can be resumed.

    Args:
        folder: The checkpoints'.
        damaged: Called with a sentence on each one that was passed over because it is damaged.
    """
    for path in checkpoints(folder):
        try:
            seal = verify(path)
        except (DamagedCheckpointError, OSError) as error:
            if not path.exists():
                continue  # removed meanwhile, by a live run
            damaged(f"{path} is damaged and not used: {error}.")
            continue
        if seal is None or seal.resumable:
            return path
    return None


def remove_older(folder: Path, keep: int) -> None:
    """Leave the newest `keep` of ResumableCheckpoint's own."""
    for path in [path for path in checkpoints(folder) if re.fullmatch(r"step=\d+\.ckpt", path.name)][keep:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def warn_if_the_next_may_not_fit(path: Path) -> None:
    """Compare the space that is left with what the newest checkpoint takes: a full disk is announced."""
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    free = shutil.disk_usage(path.parent).free
    if free < size:
        rank_zero_warn(
            f"{free / 2**30:.1f} GiB are free in {path.parent}, and a checkpoint takes {size / 2**30:.1f} GiB: the "
            "next one may not fit. Free space; the checkpoints that are there stay as they are."
        )


def warn_of_pickles(path: str | Path) -> None:
    """Of a checkpoint that cannot be loaded as tensors and plain values alone."""
    if Path(path).is_dir():
        rank_zero_warn(
            f"{path} is a folder of sharded weights, whose list of contents is a pickle in torch's format: loading it "
            "could run code. Go on only from folders whose writer you trust."
        )


def move_folder(written: Path, path: Path, global_step: int) -> None:
    """Give a complete checkpoint of sharded weights its name; one that has it is replaced."""
    if written.is_dir():
        seal_folder(written, global_step)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(written, path)
    sync_folder(path.parent)


def step_of(path: Path) -> float:
    """From the name if it says so, else from the file; one that says nothing is taken for the newest."""
    if match := re.search(r"step=(\d+)", path.name):
        return int(match[1])
    try:
        seal = read_seal(path)
    except (DamagedCheckpointError, OSError):
        return float("inf")
    return float("inf") if seal is None else seal.global_step
