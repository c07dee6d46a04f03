"""Engines that fail or hang, and ranks that die, hang or raise: the run ends soon, names the phase, leaves nothing."""

import os
import re

import pytest
from fault_runs import (
    MINUTE,
    SLACK,
    ends_within_a_minute,
    faulty_backward,
    faulty_engine,
    goes_on,
    injected_at,
)

from tealightning.reliability.deadlines import EXIT_CODE

pytestmark = pytest.mark.timeout(900)  # seconds where nothing else runs

# ---------------------------------------------------------------- one process


@pytest.mark.fault("the engine is out of memory", how="its `generate` raises MemoryError in the third step")
def test_engine_out_of_memory_ends_the_run_and_names_the_phase(fit, injected):
    (run,) = fit(*faulty_engine("memory", "generate"))
    ends_within_a_minute([run])
    assert "MemoryError: no memory left" in run.text() and "It happened while generating." in run.text()
    goes_on(fit, run)
    injected(times=1)


@pytest.mark.fault(
    "a weight sync hangs", how="`sync_weights` never returns: it sleeps in Python, or is stuck in C code"
)
@pytest.mark.parametrize("fault", ["hang", "hang_in_c"])
def test_hung_weight_sync_ends_by_its_deadline(fit, injected, fault):
    """Peers waited for ever, without an error: TRL #6796, #2923."""
    (run,) = fit(*faulty_engine(fault, "sync"), "--deadlines.sync_seconds=8")
    ends_within_a_minute([run], limit=8)
    assert run.exit_code == EXIT_CODE
    assert re.search(
        r"no progress for \d+ s while syncing weights \(deadlines.sync_seconds=8; optimizer step 2\)", run.text()
    )
    assert "sync_weights" in run.text().partition("Current thread")[2]  # of the stacks of all threads
    goes_on(fit, run)
    injected(times=1)


@pytest.mark.fault(
    "an engine hangs and holds Python's lock", how="`generate` locks a mutex twice, through ctypes.PyDLL"
)
def test_engine_that_stops_all_threads_is_ended_by_a_timer(fit, injected):
    (run,) = fit(*faulty_engine("hang_with_lock", "generate"), "--deadlines.generate_seconds=8")
    ends_within_a_minute([run], limit=8)
    assert run.exit_code == 1
    assert "Timeout (0:00:1" in run.text() and "in generate" in run.text()
    assert "_hang_in_c" in run.text()
    injected(times=1)


@pytest.mark.fault("a thread of the engine hangs when the run ends", how="after an error in `generate`")
def test_process_whose_threads_do_not_end_is_ended(fit, injected):
    (run,) = fit(*faulty_engine("raise_and_hang", "generate"), "--deadlines.exit_seconds=5")
    ends_within_a_minute([run], limit=5)
    assert run.exit_code == EXIT_CODE
    assert "KeyError: 'something that nobody expected'" in run.text()
    assert "Its threads do not end: it is ended now." in run.text()
    assert "Step 2 is saved in" in run.text()
    injected(times=1)


# ---------------------------------------------------------------- two ranks


@pytest.mark.fault("a rank dies", how="SIGKILL of rank 1 of 2 in generation, in backward and in the weight sync")
@pytest.mark.parametrize("where", ["generate", "backward", "sync"])
def test_dead_rank_ends_the_others(fit, injected, where):
    if where == "backward":
        runs = fit(*faulty_engine("kill", "none"), world_size=2, **faulty_backward("kill", rank=1))
    else:
        runs = fit(*faulty_engine("kill", where, rank=1), world_size=2)
    ends_within_a_minute(runs)
    assert runs[1].exit_code == -9
    phase = {"generate": "working between steps", "backward": "training", "sync": "syncing weights"}[where]
    assert re.search("Connection (closed|reset) by peer", runs[0].text())
    assert re.search(r"Rank 1 has given no sign of life for \d+ s; it was last heard of while ", runs[0].text())
    assert f"Rank 0 was {phase}" in runs[0].text()
    assert "Step 2 is saved in" in runs[0].text()
    injected(times=1)


@pytest.mark.fault("a rank raises while the others wait", how="rank 1 of 2 raises KeyError in generation")
def test_rank_that_raises_is_named_by_the_others(fit, injected):
    runs = fit(*faulty_engine("raise", "generate", rank=1), world_size=2)
    ends_within_a_minute(runs)
    expected = "Rank 1 failed: KeyError: 'something that nobody expected' It happened while generating."
    assert expected in runs[0].text()
    assert all("Step 2 is saved in" in run.text() for run in runs)
    injected(times=1)


@pytest.mark.fault("a rank is stopped in a collective", how="SIGSTOP of rank 1 of 2 in the weight sync")
def test_rank_that_falls_silent_ends_the_others(fit, injected):
    runs = fit(*faulty_engine("stop", "sync", rank=1), "--deadlines.silent_seconds=6", world_size=2)
    assert runs[0].wait() == EXIT_CODE
    assert runs[0].ended_at - injected_at(*runs) < (MINUTE + 6) * SLACK
    assert re.search(r"Rank 1 has given no sign of life for \d+ s \(deadlines.silent_seconds=6\)", runs[0].text())
    assert "Rank 0 was syncing weights (optimizer step 2)" in runs[0].text()
    assert "Step 2 is saved in" in runs[0].text()
    os.kill(runs[1].pid, 18)  # SIGCONT: what a stopped process does once it can go on
    ends_within_a_minute(runs)
    injected(times=1)


@pytest.mark.fault("a collective hangs", how="rank 1 of 2 never comes to the barrier of the weight sync")
def test_hung_collective_ends_all_ranks_by_the_deadline(fit, injected):
    """Peers waited for ever, without an error: TRL #6796, #2923."""
    runs = fit(*faulty_engine("hang_in_c", "sync", rank=1), "--deadlines.sync_seconds=8", world_size=2)
    ends_within_a_minute(runs, limit=8)
    for run in runs:
        assert run.exit_code == EXIT_CODE
        assert "while syncing weights (deadlines.sync_seconds=8; optimizer step 2)" in run.text()
        # Whoever is late first tells both.
        assert re.search(r"Rank [01] made no progress .* Rank [01] was last heard of while syncing weights", run.text())
    injected(times=1)


# ---------------------------------------------------------------- two ranks, started by Lightning


@pytest.mark.fault("a rank that Lightning started dies", how="SIGKILL of rank 1 of 2 in backward")
def test_rank_zero_outlives_a_rank_that_it_started(fit, injected):
    """Lightning itself would kill rank 0 with SIGKILL, and nothing could be saved."""
    (run,) = fit(*faulty_engine("kill", "none"), world_size=2, launcher=True, **faulty_backward("kill", rank=1))
    ends_within_a_minute([run])
    assert run.exit_code is not None and run.exit_code > 0
    goes_on(fit, run, world_size=2)
    assert re.search(r"Rank 1 \(process \d+\) was killed by SIGKILL; .* Rank 0 was training", run.text())
    injected(times=1)


@pytest.mark.fault("rank 0 dies", how="SIGKILL of rank 0 of 2, which had started rank 1, in generation")
def test_no_rank_outlives_rank_zero(fit, injected):
    (run,) = fit(*faulty_engine("kill", "generate", rank=0), world_size=2, launcher=True)
    ends_within_a_minute([run])
    assert run.exit_code == -9
    injected(times=1)
