"""Folders that one process holds."""

import errno
import fcntl
import json
import os
import socket

import pytest

from tealightning.reliability.locks import locked


def test_folder_is_held_by_one_and_named(tmp_path):
    told = rf"in use\. It is process {os.getpid()} on {socket.gethostname()}, since 20"
    with locked(tmp_path / "run", "in use."), pytest.raises(ValueError, match=told):
        locked(tmp_path / "run", "in use.").__enter__()
    with locked(tmp_path / "run", "in use."):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()


def test_holder_whose_process_has_ended_is_said_to_have_ended(tmp_path):
    with locked(tmp_path, "in use."):
        signed = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps(signed | {"pid": 2**22 + 1}))  # beyond the largest pid
        with pytest.raises(ValueError, match="one that it started still holds the folder"), locked(tmp_path, "in use."):
            pytest.fail("held twice")


def test_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path, "in use."):
        pass


def test_lock_waits_by_a_clock_that_does_not_jump(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", iter([1e9, -1e9, 1e12]).__next__)
    with locked(tmp_path, "in use."), pytest.raises(ValueError, match="in use"):
        locked(tmp_path, "in use.", wait_seconds=0.5).__enter__()
