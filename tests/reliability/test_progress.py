"""What a thread says it is doing."""

import threading

import pytest

from tealightning.reliability.progress import RunPhase, beat, current, during, listen, phase_of, set_ground

ME = threading.get_ident


@pytest.fixture(autouse=True)
def nothing_under_way() -> None:
    """A run of an earlier test that ended with an error leaves its last phase behind."""
    set_ground(None)


def test_the_innermost_phase_counts_and_the_one_around_it_starts_anew(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tealightning.reliability.progress.time.monotonic", lambda: clock[0])
    with during(RunPhase.TRAINING):
        clock[0] += 5
        assert (current()[ME()].phase, current()[ME()].seconds) == (RunPhase.TRAINING, 5.0)
        with during(RunPhase.SCORING):
            clock[0] += 2
            assert (current()[ME()].phase, current()[ME()].seconds) == (RunPhase.SCORING, 2.0)
        assert (current()[ME()].phase, current()[ME()].seconds) == (RunPhase.TRAINING, 0.0)
        clock[0] += 3
        beat()
        clock[0] += 1
        assert current()[ME()].seconds == 1.0
    assert ME() not in current()


def test_the_ground_is_what_is_left_when_no_phase_is():
    set_ground(RunPhase.OTHER)
    with during(RunPhase.SYNCING):
        set_ground(RunPhase.TRAINING)
        assert current()[ME()].phase == RunPhase.SYNCING
    assert current()[ME()].phase == RunPhase.TRAINING
    set_ground(None)
    assert ME() not in current()


def test_an_error_says_in_which_phase_it_was_raised_once():
    with pytest.raises(KeyError) as caught, during(RunPhase.TRAINING), during(RunPhase.SCORING):
        raise KeyError("k")
    assert caught.value.__notes__ == ["It happened while scoring."]
    assert phase_of(caught.value) == RunPhase.SCORING
    assert phase_of(KeyError("k")) is None
    assert ME() not in current()


def test_threads_are_kept_apart_and_leave_nothing():
    inside, go = threading.Event(), threading.Event()

    def work() -> None:
        with during(RunPhase.GENERATING):
            inside.set()
            go.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    with during(RunPhase.SYNCING):
        assert {doing.phase for doing in current().values()} == {RunPhase.GENERATING, RunPhase.SYNCING}
    go.set()
    thread.join(30)
    assert not current()


def test_listeners_are_told_by_the_thread_that_changes():
    told = []
    stop = listen(lambda: told.append(threading.get_ident()))
    with during(RunPhase.SAVING):
        pass
    stop()
    with during(RunPhase.SAVING):
        pass
    assert told == [ME(), ME()]
