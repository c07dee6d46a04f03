"""Files of checkpoints: whole or not there, and verified."""

import json
import os
import shutil
import warnings
import zipfile

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from tealightning.reliability.checkpoint_files import (
    CheckpointSummary,
    DamagedCheckpointError,
    VerifiedCheckpointIO,
    checkpoint_file,
    checkpoints,
    move_folder,
    newest_good,
    read_summary,
    remove_older,
    verify,
    warn_if_the_next_may_not_fit,
)

CHECKPOINT = {"state_dict": {"w": torch.arange(5000.0)}, "optimizer_states": [], "global_step": 40}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "checkpoints" / "step=000040.ckpt"
    VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, file)
    return file


def test_a_checkpoint_comes_back_and_says_what_it_is(path):
    loaded = VerifiedCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])
    summary = verify(path)
    assert (summary.global_step, summary.is_resumable) == (40, True)
    assert read_summary(path) == summary


def test_other_programs_read_the_file_as_ever(path):
    assert torch.load(path, weights_only=True)["global_step"] == 40
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_changed_bit_is_found_or_changes_nothing(path):
    """Of all bits of the list of parts, and one in each 500 bytes of the others."""
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")  # of the list
    bits = [*range(0, 8 * start, 4003), *range(8 * start, 8 * len(whole), 3)]
    found = 0
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = VerifiedCheckpointIO().load_checkpoint(path)
        except DamagedCheckpointError:
            found += 1
            continue
        assert torch.equal(loaded.pop("state_dict")["w"], CHECKPOINT["state_dict"]["w"]), f"bit {bit}"
        assert loaded == {"optimizer_states": [], "global_step": 40}
        assert verify(path) == CheckpointSummary(global_step=40, is_resumable=True)
    assert found > len(bits) / 2


@pytest.mark.parametrize("position", [1000, 15_000, -500, -250, -100])
def test_a_changed_byte_is_found(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        verify(path)
    with pytest.raises(DamagedCheckpointError):
        VerifiedCheckpointIO().load_checkpoint(path)


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
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": 60}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_lightning_wrote_is_verified_by_its_own_checksums(tmp_path):
    path = tmp_path / "epoch=0-step=5.ckpt"
    TorchCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert verify(path).global_step == 40
    assert VerifiedCheckpointIO().load_checkpoint(path)["global_step"] == 40
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        verify(path)


def test_a_file_with_a_seal_of_an_older_version_is_loaded(path):
    """The zip file's comment, with a checksum of all before it."""
    seal = json.dumps({"tealightning": {"sha256": "0" * 64, "global_step": 40, "resumable": True}}).encode()
    data = path.read_bytes()
    path.write_bytes(data[:-2] + len(seal).to_bytes(2, "little") + seal)
    assert verify(path) == CheckpointSummary(global_step=40, is_resumable=True)
    assert VerifiedCheckpointIO().load_checkpoint(path)["global_step"] == 40


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_file_that_could_run_code_is_refused_unless_asked_for(tmp_path, capsys):
    path = tmp_path / "step=1.ckpt"
    VerifiedCheckpointIO().save_checkpoint(CHECKPOINT | {"payload": Payload()}, path)
    with pytest.raises(ValueError, match=r"could run code: .* --weights_only=false"):
        VerifiedCheckpointIO().load_checkpoint(path)
    assert verify(path) == CheckpointSummary(global_step=None, is_resumable=True)
    assert "code was run" not in capsys.readouterr().out
    with pytest.warns(UserWarning, match="code in it would be run"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert "code was run" in capsys.readouterr().out


def test_the_newest_good_one_is_that_of_the_highest_step_whatever_the_clock_says(path):
    folder = path.parent
    for step in (60, 80, 100):
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": step}, checkpoint_file(folder, step))
    VerifiedCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 120}, folder / "weights-step=120.ckpt")
    os.utime(path, (4e9, 4e9))
    checkpoint_file(folder, 100).write_bytes(b"half")
    told = []
    assert newest_good(folder, told.append) == checkpoint_file(folder, 80)
    assert len(told) == 1 and "step=000100.ckpt is damaged and not used: it is truncated" in told[0]
    assert newest_good(folder / "nothing", told.append) is None


def test_what_a_live_run_removes_meanwhile_is_not_told_to_be_damaged(path, monkeypatch):
    folder = path.parent
    for step in (60, 80):
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": step}, checkpoint_file(folder, step))
    removed = checkpoint_file(folder, 80)

    def verify_late(one):
        removed.unlink(missing_ok=True)
        return verify(one)

    monkeypatch.setattr("tealightning.reliability.checkpoint_files.verify", verify_late)
    assert newest_good(folder, pytest.fail) == checkpoint_file(folder, 60)

    listed = list(folder.glob("*.ckpt"))
    monkeypatch.setattr(type(folder), "glob", lambda self, pattern: iter([*listed, removed]))
    assert removed in checkpoints(folder)  # between its being listed and looked at


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_good(path, monkeypatch):
    other = checkpoint_file(path.parent, 500)
    VerifiedCheckpointIO().save_checkpoint(CHECKPOINT | {"global_step": 500, "more": torch.zeros(9)}, other)
    testzip = zipfile.ZipFile.testzip

    def replaced(archive):
        if other.exists():
            os.replace(other, path)
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", replaced)
    assert verify(path).is_resumable
    assert verify(path).global_step == 500 and not other.exists()


def test_the_oldest_of_our_own_are_removed(path):
    folder = path.parent
    VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, folder / "best.ckpt")
    for step in (60, 80):
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, checkpoint_file(folder, step))
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
    assert verify(path) == CheckpointSummary(global_step=None, is_resumable=True)
    (path / "meta.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="not completed"):
        verify(path)


def test_disk_that_would_not_take_another_checkpoint_is_announced(tmp_path, monkeypatch):
    (tmp_path / "step=000001.ckpt").write_bytes(bytes(1000))
    usage = shutil.disk_usage(tmp_path)
    for free, warned in ((1001, 0), (999, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warn_if_the_next_may_not_fit(tmp_path / "step=000001.ckpt")
        assert len(told) == warned
