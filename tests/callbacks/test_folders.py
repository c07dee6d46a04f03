import errno
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tealightning.reliability.files import run_folder, write_whole


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
