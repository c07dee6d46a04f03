"""Deadlines without a fault, and what a watch makes of one; whole runs with faults are in tests/faults."""

import os
import signal
import threading
import time

import pytest
from playground_fits import fit

from tealightning.callbacks import Deadlines
from tealightning.reliability import temp_dirs
from tealightning.reliability.guard import Guard
from tealightning.reliability.progress import RunPhase, current, during
from tealightning.reliability.rank_failures import OtherRanks
from tealightning.reliability.rank_heartbeat import Heard
from tealightning.reliability.watchdog import RunEnded, Surroundings, Watch


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_deadlines_refuse_limits_that_are_none(value):
    with pytest.raises(ValueError, match=r"deadlines\.sync_seconds must be above 0, or null for no limit, got"):
        Deadlines(sync_seconds=value)


def test_deadlines_map_every_phase_to_a_limit():
    deadlines = Deadlines(sync_seconds=7, other_seconds=None)
    assert set(deadlines.limits) == set(RunPhase)
    assert deadlines.limits[RunPhase.SYNCING] == 7
    assert deadlines.limits[RunPhase.OTHER] is None


def test_a_healthy_run_leaves_no_thread_no_phase_and_no_handler(playground):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # a run of an earlier test that failed may have left its own
    fit(playground, steps=1, callbacks=[Deadlines()])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tealightning ")]
    assert not current()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def surroundings(**limits: float) -> Surroundings:
    return Surroundings(
        who="The run",
        limits={phase: limits.get(phase.name) for phase in RunPhase},
        step=lambda: "optimizer step 4",
        rescue=lambda fault: None,
        is_failing=lambda: False,
        is_handled=lambda: False,
    )


def test_watch_raises_in_a_main_thread_that_sleeps():
    watch = Watch(surroundings(SYNCING=1.0), None)
    watch.start()
    try:
        with (
            pytest.raises(RunEnded, match=r"no progress for \d+ s while syncing weights .*=1; optimizer step 4"),
            during(RunPhase.SYNCING),
        ):
            time.sleep(60)
    finally:
        watch.stop()


class Told(OtherRanks):
    """Ranks of which this is known."""

    def __init__(self, *late: bool) -> None:
        self._peers = type("Peers", (), {})()
        self._peers.others = {rank: Heard(state={"is_late": is_late}, at=0.0) for rank, is_late in enumerate(late, 1)}


def test_a_rank_that_waits_is_not_stuck_while_another_works():
    with during(RunPhase.TRAINING):
        (waiting,) = current().values()
    with during(RunPhase.GENERATING):
        (generating,) = current().values()
    watch = Watch(surroundings(), None)
    try:
        assert watch._is_stuck(waiting)
        watch.ranks = Told(True, False)
        assert not watch._is_stuck(waiting)
        assert watch._is_stuck(generating)  # waits for no rank
        watch.ranks = Told(True, True)
        assert watch._is_stuck(waiting)
    finally:
        watch.ranks = None
        watch.stop()


def test_guard_removes_what_a_killed_process_has_left(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        temp_dirs.add(folder)
        guard = Guard()
        guard.expect(None, "")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()


def test_guard_that_is_stopped_removes_nothing(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    temp_dirs.add(folder)
    guard = Guard()
    guard.expect(None, "")
    guard.stop()
    assert folder.exists()
    temp_dirs.discard(folder)
    assert str(folder) not in temp_dirs.folders()
