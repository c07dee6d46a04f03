"""What a thread says it is doing."""

import threading

import pytest

from tealightning.reliability.progress import (
    Activity,
    activity_of,
    beat,
    current,
    during,
    is_process_ending,
    owns_process,
    set_default,
)

ME = threading.get_ident


@pytest.fixture(autouse=True)
def nothing_under_way() -> None:
    """A run of an earlier test that ended with an error leaves its last activity behind."""
    set_default(None)


def test_the_innermost_activity_counts_and_the_one_around_it_starts_anew(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tealightning.reliability.progress.time.monotonic", lambda: clock[0])
    with during(Activity.TRAINING):
        clock[0] += 5
        assert current()[ME()] == (Activity.TRAINING, 5.0)
        with during(Activity.SCORING):
            clock[0] += 2
            assert current()[ME()] == (Activity.SCORING, 2.0)
        assert current()[ME()] == (Activity.TRAINING, 0.0)
        clock[0] += 3
        beat()
        clock[0] += 1
        assert current()[ME()][1] == 1.0
    assert ME() not in current()


def test_the_default_is_what_is_left_outside_of_activities():
    set_default(Activity.OTHER)
    with during(Activity.SYNCING):
        set_default(Activity.TRAINING)
        assert current()[ME()][0] == Activity.SYNCING
    assert current()[ME()][0] == Activity.TRAINING
    set_default(None)
    assert ME() not in current()


def test_an_error_says_during_which_activity_it_was_raised_once():
    with pytest.raises(KeyError) as caught, during(Activity.TRAINING), during(Activity.SCORING):
        raise KeyError("k")
    assert caught.value.__notes__ == ["It happened while scoring."]
    assert activity_of(caught.value) == Activity.SCORING
    assert activity_of(KeyError("k")) is None
    assert ME() not in current()


def test_threads_are_kept_apart_and_leave_nothing():
    inside, go = threading.Event(), threading.Event()

    def work() -> None:
        with during(Activity.GENERATING):
            inside.set()
            go.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    with during(Activity.SYNCING):
        assert {activity for activity, _ in current().values()} == {Activity.GENERATING, Activity.SYNCING}
    go.set()
    thread.join(30)
    assert not current()


def test_a_thread_that_changes_its_activity_says_so(monkeypatch):
    told = []
    monkeypatch.setattr("tealightning.reliability.progress.on_change", lambda: told.append(threading.get_ident()))
    with during(Activity.SAVING):
        pass
    assert told == [ME(), ME()]


def test_a_process_ends_with_its_entry_point_and_not_with_a_call_of_it():
    @owns_process
    def main(argv=None):
        if argv is None:
            raise SystemExit(2)

    main(["fit"])
    assert not is_process_ending.is_set()
    with pytest.raises(SystemExit):
        main()
    assert is_process_ending.is_set()
    main(["fit"])  # another command in the same process, which goes on
    assert not is_process_ending.is_set()
