"""Files of checkpoints: whole or not there, and verified."""

import json
import os
import zipfile

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from tealightning.reliability import checkpoint_files as checkpoint_io
from tealightning.reliability.checkpoint_files import (
    DamagedCheckpointError,
    SealedCheckpointIO,
    checkpoint_file,
    checkpoints,
    move_folder,
    newest_good,
    read_seal,
    remove_older,
    verify,
)

CHECKPOINT = {"state_dict": {"w": torch.arange(5000.0)}, "optimizer_states": [], "global_step": 40}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "checkpoints" / "step=000040.ckpt"
    SealedCheckpointIO().save_checkpoint(CHECKPOINT, file)
    return file


def test_a_checkpoint_comes_back_and_says_what_it_is(path):
    loaded = SealedCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])
    seal = verify(path)
    assert (seal.global_step, seal.resumable) == (40, True)
    assert read_seal(path) == seal


def test_other_programs_read_the_file_as_ever(path):
    assert torch.load(path, weights_only=True)["global_step"] == 40
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.comment)["tealightning"]["global_step"] == 40


@pytest.mark.parametrize("position", [10, 1000, -300, -100])
def test_any_changed_byte_is_found(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        verify(path)
    with pytest.raises(DamagedCheckpointError):
        SealedCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("left", [0, 1, 0.3, 0.99, -1, -60])
def test_a_truncated_file_is_found(path, left):
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))] if isinstance(left, float) else data[:left])
    with pytest.raises(DamagedCheckpointError, match=r"truncated|no checkpoint"):
        verify(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        SealedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": 60}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_lightning_wrote_is_verified_by_its_own_checksums(tmp_path):
    path = tmp_path / "epoch=0-step=5.ckpt"
    TorchCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert verify(path) is None
    assert SealedCheckpointIO().load_checkpoint(path)["global_step"] == 40
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        verify(path)


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_file_that_could_run_code_is_refused_unless_asked_for(tmp_path, capsys):
    path = tmp_path / "step=1.ckpt"
    SealedCheckpointIO().save_checkpoint(CHECKPOINT | {"payload": Payload()}, path)
    with pytest.raises(ValueError, match=r"could run code: .* --weights_only=false"):
        SealedCheckpointIO().load_checkpoint(path)
    assert "code was run" not in capsys.readouterr().out
    with pytest.warns(UserWarning, match="code in it would be run"):
        SealedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert "code was run" in capsys.readouterr().out


def test_the_newest_good_one_is_that_of_the_highest_step_whatever_the_clock_says(path):
    folder = path.parent
    for step in (60, 80, 100):
        SealedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": step}, checkpoint_file(folder, step))
    SealedCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 120}, folder / "weights-step=120.ckpt")
    os.utime(path, (4e9, 4e9))
    checkpoint_file(folder, 100).write_bytes(b"half")
    told = []
    assert newest_good(folder, told.append) == checkpoint_file(folder, 80)
    assert len(told) == 1 and "step=000100.ckpt is damaged and not used: it is truncated" in told[0]
    assert newest_good(folder / "nothing", told.append) is None


def test_what_a_live_run_removes_meanwhile_is_not_told_to_be_damaged(path, monkeypatch):
    folder = path.parent
    for step in (60, 80):
        SealedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": step}, checkpoint_file(folder, step))
    removed = checkpoint_file(folder, 80)

    def verify_late(one):
        removed.unlink(missing_ok=True)
        return verify(one)

    monkeypatch.setattr("tealightning.reliability.checkpoint_files.verify", verify_late)
    assert newest_good(folder, pytest.fail) == checkpoint_file(folder, 60)

    listed = list(folder.glob("*.ckpt"))
    monkeypatch.setattr(type(folder), "glob", lambda self, pattern: iter([*listed, removed]))
    assert removed in checkpoints(folder)  # between its being listed and looked at


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_verified_as_it_was(path, monkeypatch):
    folder = path.parent
    other = checkpoint_file(folder, 500)
    SealedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": 500, "more": torch.zeros(9)}, other)
    blocks = checkpoint_io._blocks

    def replaced(*args):
        if other.exists():
            os.replace(other, path)
        return blocks(*args)

    before = verify(path).global_step
    monkeypatch.setattr(checkpoint_io, "_blocks", replaced)
    assert verify(path).global_step == before
    assert verify(path).global_step == 500


def test_the_oldest_of_our_own_are_removed(path):
    folder = path.parent
    SealedCheckpointIO().save_checkpoint(CHECKPOINT, folder / "best.ckpt")
    for step in (60, 80):
        SealedCheckpointIO().save_checkpoint(CHECKPOINT, checkpoint_file(folder, step))
    remove_older(folder, keep=2)
    assert sorted(file.name for file in checkpoints(folder)) == ["best.ckpt", "step=000060.ckpt", "step=000080.ckpt"]


def folder_of_shards(path):
    path.mkdir(parents=True)
    for name in (".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"):
        (path / name).write_bytes(name.encode() * 100)
    return path


def test_a_folder_of_shards_is_complete_once_it_has_its_name(tmp_path):
    path = checkpoint_file(tmp_path, 20)
    written = folder_of_shards(tmp_path / f".{path.name}.part")
    assert checkpoints(tmp_path) == []
    move_folder(written, path, 20)
    assert verify(path).global_step == 20
    assert newest_good(tmp_path, print) == path
    (path / "__1_0.distcp").write_bytes(b"changed")
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp does not have the checksum"):
        verify(path)
    (path / "__1_0.distcp").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp is missing"):
        verify(path)


def test_a_folder_that_lightning_did_not_complete_is_found(tmp_path):
    path = folder_of_shards(tmp_path / "epoch=0-step=2.ckpt")
    assert verify(path) is None
    (path / "meta.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="not completed"):
        verify(path)
