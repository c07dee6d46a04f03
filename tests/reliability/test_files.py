"""Files and folders that are there whole or not at all; the folder of a run."""

import errno
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
from full_disk import largest_file
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import tealightning.reliability.files
from tealightning.reliability.files import (
    append_lines,
    going_on_without,
    run_folder,
    whole_folder,
    write_whole,
)


def test_appended_lines_follow_the_others(tmp_path):
    file = tmp_path / "new" / "samples.jsonl"
    append_lines(file, "ä\n")
    append_lines(file, "b\nc\n")
    assert file.read_text(encoding="utf-8") == "ä\nb\nc\n"


@pytest.mark.parametrize(
    ("content", "kept"), [("a\nhal", "a\n"), ("hal", ""), ("", ""), ("a\n" + "x" * 200_000, "a\n")]
)
def test_half_line_of_a_killed_process_is_cut(tmp_path, content, kept):
    file = tmp_path / "samples.jsonl"
    file.write_text(content)
    append_lines(file, "next\n")
    assert file.read_text() == kept + "next\n"
    file.write_text(content)
    append_lines(file, "")
    assert file.read_text() == kept


def test_refused_lines_leave_none_of_them(tmp_path):
    file = tmp_path / "samples.jsonl"
    append_lines(file, "first\n")
    with largest_file(100), pytest.raises(OSError, match="too large"):
        append_lines(file, "x" * 60 + "\n" + "y" * 60 + "\n")
    assert file.read_text() == "first\n"
    append_lines(file, "second\n")
    assert file.read_text() == "first\nsecond\n"


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_new_folder_replaces_the_old_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(tealightning.reliability.files, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        with whole_folder(tmp_path / "policy") as folder:
            fill(folder, text)
        assert (tmp_path / "policy" / "inner" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["policy"]


@pytest.mark.parametrize("failing", ["filling", "renaming"])
def test_folder_that_cannot_be_completed_leaves_the_old_one(tmp_path, monkeypatch, failing):
    with whole_folder(tmp_path / "policy") as folder:
        fill(folder, "old")
    if failing == "renaming":
        replace = os.replace

        def refuse(source, target):
            if os.path.basename(source) == "new":
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(tealightning.reliability.files, "_exchange", lambda first, second: False)
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError), whole_folder(tmp_path / "policy") as folder:
        fill(folder, "new")
        if failing == "filling":
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "policy" / "inner" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["policy"]


def test_run_goes_on_without_what_the_disk_refuses_and_says_so(tmp_path):
    told = pytest.warns(
        UserWarning, match=r"Could not write samples; these are lost \(.*too large.*\)\. The run goes on"
    )
    with told, largest_file(10), going_on_without("samples; these are lost"):
        write_whole(tmp_path / "file", b"x" * 100)
    with pytest.raises(KeyError), going_on_without("samples"):
        raise KeyError("a defect is no full disk")


def folder_of(**kwargs):
    return run_folder(pl.Trainer(accelerator="cpu", **{"enable_checkpointing": False} | kwargs))


def test_the_first_loggers_folder_is_the_runs(tmp_path):
    csv, tensorboard = CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")
    assert folder_of(logger=csv) == tmp_path / "a" / "version_0"
    assert folder_of(logger=[tensorboard, csv]) == tmp_path / "b" / "version_0"


def test_without_a_logger_it_is_the_trainers_root(tmp_path):
    assert folder_of(logger=False, default_root_dir=tmp_path) == tmp_path


def test_a_trial_run_leaves_nothing_in_the_working_folder(tmp_path):
    folder = folder_of(fast_dev_run=True, default_root_dir=tmp_path)
    assert not folder.is_relative_to(tmp_path)
    assert not folder.is_relative_to(Path(os.getcwd()))


def test_full_disk_leaves_the_older_file_and_no_temporary_one(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "table.md"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.md"]
