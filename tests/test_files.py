"""Files and folders that are there whole or not at all, and folders that one process holds."""

import errno
import fcntl
import json
import os
import socket

import pytest
from full_disk import largest_file

import tealightning.reliability.files
from tealightning.reliability.files import append_lines, cut_half_line, going_on_without, whole_folder, write_whole
from tealightning.reliability.locks import locked


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
    cut_half_line(file)
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
