"""Checkpoint files: written atomically, verified before they are loaded, the newest good one, removal of old ones."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.errors import UserError
from tealightning.reliability.files import sync, whole_file, write_whole

MANIFEST = "checksums.json"
_IS_FOLDER = 0x10  # attribute of a zip file's part, under no checksum: torch would leave a tensor with it unread


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written; the text says how that was seen."""


@dataclass(kw_only=True, slots=True, frozen=True)
class CheckpointSummary:
    """What a checkpoint says about itself."""

    global_step: int | None  # optimizer steps; None if it does not say
    is_resumable: bool  # it holds the optimizer's state too, or does not say


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, and verified before they are loaded: against the checksums of
    the zip file that `torch.save` writes (CRC-32, one for each part). Remote addresses are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            with whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch reports a full disk as an inconsistent zip file
                raise error.__context__ from None
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, on the CPU. More than tensors and plain values is refused unless `weights_only` is False."""
        if "://" not in str(path) and Path(path).exists():
            verify(Path(path))
        if weights_only is False:
            rank_zero_warn(f"{path} is loaded with weights_only=false: code in it would be run.")
        try:
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
        except UnpicklingError as error:
            raise UserError(
                f"{path} holds more than tensors and plain values, and loading it could run code: "
                f"{str(error).splitlines()[0]} If you trust whoever wrote it, say --weights_only=false."
            ) from error


def verify(path: Path) -> CheckpointSummary:
    """Summary of a checkpoint, all of which is read and compared with its checksums.

    Raises:
        DamagedCheckpointError: if it is truncated or changed.
    """
    if path.is_dir():
        for name, sha256 in _read_manifest(path)["files"].items():
            if not (path / name).is_file():
                raise DamagedCheckpointError(f"its file {name} is missing")
            if _sha256(path / name) != sha256:
                raise DamagedCheckpointError(f"its file {name} does not have the checksum that was written with it")
        return read_summary(path)
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            folders = [part.filename for part in archive.infolist() if part.external_attr & _IS_FOLDER]
            damaged = archive.testzip() or next(iter(folders), None)
        except Exception as error:  # the reader raises whatever a changed byte in the list of parts leads to
            raise DamagedCheckpointError(f"it is truncated, or no checkpoint ({error})") from error
    if damaged is not None:
        raise DamagedCheckpointError(f"its part {damaged} does not have the checksum that was written with it")
    return read_summary(path)


def read_summary(path: Path) -> CheckpointSummary:
    """Summary of a file or folder; the tensors are neither read nor verified."""
    if path.is_dir():
        return CheckpointSummary(global_step=_read_manifest(path)["global_step"], is_resumable=True)
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except UnpicklingError:  # more than tensors and plain values
        return CheckpointSummary(global_step=None, is_resumable=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch's reader says of a changed byte that the zip file's own has overlooked
        raise DamagedCheckpointError(f"it is truncated, or no checkpoint ({error})") from error
    if not isinstance(content, dict):
        return CheckpointSummary(global_step=None, is_resumable=False)
    return CheckpointSummary(global_step=content.get("global_step"), is_resumable="optimizer_states" in content)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """`global_step` of a folder and the checksums of its `files`; neither for a complete one without a manifest."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            return {"global_step": int(content["global_step"]), "files": dict(content["files"])}
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"its {MANIFEST} cannot be read ({error})") from error
    if not ((folder / ".metadata").is_file() and (folder / "meta.pt").is_file()):
        raise DamagedCheckpointError("it is a folder that was not completed")
    return {"global_step": None, "files": {}}


def move_folder(written: Path, path: Path, global_step: int) -> None:
    """Give a complete checkpoint of sharded weights a list of checksums, and then its name."""
    if written.is_dir():
        files = {}
        for file in sorted(filter(Path.is_file, written.rglob("*"))):
            files[str(file.relative_to(written))] = _sha256(file)
            sync(file)
        write_whole(written / MANIFEST, json.dumps({"global_step": global_step, "files": files}, indent=1).encode())
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(written, path)
    sync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_file(folder: Path, global_step: int) -> Path:
    """Where ResumableCheckpoint keeps the checkpoint of an optimizer step."""
    return folder / f"step={global_step:06d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the one of the highest optimizer step first."""
    paths = [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")]
    return sorted(paths, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path: Path) -> float:
    """Optimizer step of a checkpoint, by its name, else by its content; infinite if neither says."""
    if match := re.search(r"step=(\d+)", path.name):
        return int(match[1])
    try:
        step = read_summary(path).global_step
    except (DamagedCheckpointError, OSError):
        step = None
    return float("inf") if step is None else step


def newest_good(folder: Path, on_damaged: Callable[[str], None]) -> Path | None:
    """The resumable checkpoint of the highest optimizer step that is good; `on_damaged` is told of the damaged ones."""
    for path in checkpoints(folder):
        try:
            if verify(path).is_resumable:
                return path
        except (DamagedCheckpointError, OSError) as error:
            if path.exists():  # else a live run has removed it meanwhile
                on_damaged(f"{path} is damaged and not used: {error}.")
    return None


def remove_older(folder: Path, keep: int) -> None:
    """Remove all of ResumableCheckpoint's own but the newest `keep`."""
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
    """Warn of a checkpoint that cannot be loaded as tensors and plain values alone."""
    if Path(path).is_dir():
        rank_zero_warn(
            f"{path} is a folder of sharded weights, whose list of contents is a pickle in torch's format: loading it "
            "could run code. Go on only from folders whose writer you trust."
        )
