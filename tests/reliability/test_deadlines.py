"""Deadlines without a fault, and what the watchdog makes of one; whole runs with faults are in tests/faults."""

import ctypes
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import RunningStage, TrainerStatus
from playground_fits import fit

from tealightning.callbacks import Deadlines
from tealightning.reliability.deadlines import NO_LIMIT, RunEnded, Watchdog
from tealightning.reliability.progress import Activity, current, during, set_default
from tealightning.reliability.ranks import RankHeartbeat


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_deadlines_refuse_limits_that_are_none(value):
    with pytest.raises(ValueError, match=r"deadlines\.sync_seconds must be above 0, or null for no limit, got"):
        Deadlines(sync_seconds=value)


def test_deadlines_map_every_activity_to_a_limit():
    deadlines = Deadlines(sync_seconds=7, other_seconds=None)
    assert set(deadlines.limits) == set(Activity)
    assert deadlines.limits[Activity.SYNCING] == 7
    assert deadlines.limits[Activity.OTHER] == NO_LIMIT


def test_a_healthy_run_leaves_no_thread_no_activity_and_no_handler(playground):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # a run of an earlier test that failed may have left its own
    fit(playground, steps=1, callbacks=[Deadlines()])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tealightning ")]
    assert not current()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def watchdog_of(**limits: float) -> Watchdog:
    """A watchdog over a trainer at its fourth step."""
    state = SimpleNamespace(status=TrainerStatus.RUNNING, stage=RunningStage.TRAINING)
    trainer = SimpleNamespace(state=state, global_step=4, global_rank=0, checkpoint_callbacks=[])
    return Watchdog(trainer, {activity: limits.get(activity.name, NO_LIMIT) for activity in Activity}, RankHeartbeat())


def test_watchdog_raises_in_a_main_thread_that_sleeps():
    watchdog = watchdog_of(SYNCING=1.0)
    watchdog.start()
    try:
        with (
            pytest.raises(RunEnded, match=r"no progress for \d+ s while syncing weights .*=1; optimizer step 4"),
            during(Activity.SYNCING),
        ):
            time.sleep(60)
    finally:
        watchdog.stop()


def test_a_rank_that_waits_is_not_stuck_while_another_works():
    watchdog = watchdog_of(TRAINING=0.01, GENERATING=0.01)

    def is_stuck_in(activity):
        with during(activity):
            time.sleep(0.05)
            return watchdog._find_fault() is not None

    ranks = RankHeartbeat(0, 3, "test")  # not started
    try:
        assert is_stuck_in(Activity.TRAINING)
        watchdog.ranks = ranks
        ranks.others[1].message["is_late"] = True
        assert not is_stuck_in(Activity.TRAINING)
        assert is_stuck_in(Activity.GENERATING)  # waits for no rank
        ranks.others[2].message["is_late"] = True
        assert is_stuck_in(Activity.TRAINING)
    finally:
        watchdog.stop()


def test_each_backward_pass_is_progress(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tealightning.reliability.progress.time.monotonic", lambda: clock[0])
    set_default(Activity.TRAINING)
    clock[0] += 5
    Deadlines().on_after_backward(None, None)
    clock[0] += 1
    assert current()[threading.get_ident()][1] == 1.0
    set_default(None)


def test_process_that_is_stuck_with_pythons_lock_ends_with_its_stacks(tmp_path):
    """No thread of it runs any more."""
    stacks = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(stacks, os.O_WRONLY | os.O_CREAT), 2)
        watchdog_of(SYNCING=0.5)
        with during(Activity.SYNCING):
            mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
            for _ in range(2):
                library.pthread_mutex_lock(mutex)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "Timeout (0:00:10" in stacks.read_text() and "test_deadlines.py" in stacks.read_text()
