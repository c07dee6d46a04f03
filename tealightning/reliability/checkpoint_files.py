"""Checkpoint files: written atomically with a checksum, verified, the newest good one, removal of old ones."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.errors import UserError
from tealightning.reliability.files import sync_folder, whole_file, write_whole

MANIFEST = "checksums.json"
_END_RECORD = b"PK\x05\x06"  # of a zip file: 22 bytes, the last two the length of the comment that follows
_LONGEST_COMMENT = 1024


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written; the text says how that was seen."""


@dataclass(kw_only=True, slots=True)
class Seal:
    """What a checkpoint says about itself."""

    sha256: str  # of the file up to the comment that holds this
    global_step: int  # optimizer steps
    resumable: bool  # it holds the optimizer's state too


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, with a checksum that is verified before they are loaded.

    The file is a temporary one until all of it is on the disk. Checksum and step are the comment of the zip file that
    `torch.save` writes, so one rename makes file and checksum appear together (with a file beside it there would be a
    moment in which the two do not fit), and `torch.load` reads the file as ever. Addresses that are no local path are
    left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if _is_remote(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            with whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
                step = int(checkpoint.get("global_step", 0))
                _seal(file, global_step=step, resumable="optimizer_states" in checkpoint)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch reports a full disk as an inconsistent zip file
                raise error.__context__ from None
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, on the CPU.

        Raises:
            FileNotFoundError: if there is none.
            DamagedCheckpointError: if it is not what was written.
            ValueError: if it holds more than tensors and plain values, and `weights_only` is not False.
        """
        if not _is_remote(path) and Path(path).exists():
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


def verify(path: Path) -> Seal | None:
    """What the checkpoint says about itself, once all of it was read and its checksum is right; None for one that
    another program wrote, of which the zip file's own checksums are right.

    Raises:
        DamagedCheckpointError: if it is truncated or changed.
    """
    if path.is_dir():
        return _verify_folder(path)
    with path.open("rb") as file:  # once: a live run may put another in its place meanwhile
        comment = _comment(file)
        seal = _seal_in(comment)
        if seal is None:
            _verify_zip(file)
            return None
        found = _sha256(_blocks(file, file.seek(0, 2) - len(comment)))
    if found != seal.sha256:
        raise DamagedCheckpointError("its content does not have the checksum that was written with it")
    return seal


def read_seal(path: Path) -> Seal | None:
    """What a file or folder says about itself, unverified; None if another program wrote it.

    Raises:
        DamagedCheckpointError: if it does not end as such a file does.
    """
    if path.is_dir():
        return _read_manifest(path)[0]
    with path.open("rb") as file:
        return _seal_in(_comment(file))


def _seal_in(comment: bytes) -> Seal | None:
    try:
        return Seal(**json.loads(comment)["tealightning"]) if comment else None
    except (ValueError, KeyError, TypeError):
        return None


def seal_folder(folder: Path, global_step: int) -> None:
    """Write the checksums of a checkpoint of many files (of sharded weights) into it.

    Such a folder is written under another name and renamed when this is done, so it is complete if it is there.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = _sha256(_blocks(file))
    write_whole(folder / MANIFEST, json.dumps({"global_step": global_step, "files": files}, indent=1).encode())
    sync_folder(folder)


def _seal(file: BinaryIO, *, global_step: int, resumable: bool) -> None:
    file.flush()
    file.seek(-22, 2)
    record = file.read(22)
    assert record.startswith(_END_RECORD) and record.endswith(b"\0\0"), "torch.save ends a zip file without a comment"
    seal: dict[str, Any] = {"sha256": "0" * 64, "global_step": global_step, "resumable": resumable}
    length = len(json.dumps({"tealightning": seal}))
    file.seek(-2, 2)
    file.write(length.to_bytes(2, "little"))
    file.seek(0)
    seal["sha256"] = _sha256(_blocks(file))
    file.seek(0, 2)
    file.write(json.dumps({"tealightning": seal}).encode())


def _comment(file: BinaryIO) -> bytes:
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _LONGEST_COMMENT - 22))
    tail = file.read()
    start = tail.rfind(_END_RECORD)
    if start < 0 or len(tail) < start + 22:
        raise DamagedCheckpointError("it is truncated, or no checkpoint")
    comment = tail[start + 22 :]
    if len(comment) != int.from_bytes(tail[start + 20 : start + 22], "little"):
        raise DamagedCheckpointError("it is truncated in its last bytes")
    return comment


def _verify_zip(file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise DamagedCheckpointError(str(error)) from error
    if damaged is not None:
        raise DamagedCheckpointError(f"its part {damaged} does not have the checksum that was written with it")


def _verify_folder(folder: Path) -> Seal | None:
    seal, files = _read_manifest(folder)
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise DamagedCheckpointError(f"its file {name} is missing")
        if _sha256_of_file(folder / name) != sha256:
            raise DamagedCheckpointError(f"its file {name} does not have the checksum that was written with it")
    return seal


def _read_manifest(folder: Path) -> tuple[Seal | None, dict[str, str]]:
    """The seal of a folder and the checksums of its files; neither for a complete one without a manifest."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            return Seal(sha256="", global_step=int(content["global_step"]), resumable=True), dict(content["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"its {MANIFEST} cannot be read ({error})") from error
    if not ((folder / ".metadata").is_file() and (folder / "meta.pt").is_file()):
        raise DamagedCheckpointError("it is a folder that was not completed")
    return None, {}


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(_blocks(file))


def _blocks(file: BinaryIO, size: int | None = None) -> Iterable[bytes]:
    """The file from its beginning, up to `size` bytes."""
    file.seek(0)
    left = size
    while block := file.read(2**22 if left is None else min(2**22, left)):
        left = None if left is None else left - len(block)
        yield block


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


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
