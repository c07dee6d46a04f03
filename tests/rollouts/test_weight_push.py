"""Weights in shared memory: the folder of a killed process goes with the next start, one in use never."""

import os
import signal

from tealightning.rollouts import weight_push
from tealightning.rollouts.weight_push import FilePush


def test_the_next_start_removes_what_a_killed_process_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_push, "_MEMORY", str(tmp_path))
    child = os.fork()
    if child == 0:
        killed = FilePush(None)
        os.kill(os.getpid(), signal.SIGKILL)
        killed.close()
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    other = tmp_path / "someone-elses"
    other.mkdir()
    live = FilePush(None)
    assert left.exists()  # it might just be being made
    for folder in (left, live.folder, other):
        os.utime(folder, (1e9, 1e9))
    FilePush(None).close()
    assert sorted(tmp_path.iterdir()) == sorted([live.folder, other])
    live.close()
    live.close()
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_was_named_is_not_tidied(tmp_path):
    """It may be on a network, where other machines' locks cannot be seen."""
    (tmp_path / "tealightning-weights-1-abc").mkdir()
    os.utime(tmp_path / "tealightning-weights-1-abc", (1e9, 1e9))
    FilePush(str(tmp_path)).close()
    assert len(list(tmp_path.iterdir())) == 1
