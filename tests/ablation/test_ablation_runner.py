import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import ablation_jobs
import pytest
from ablation_jobs import act, job_of
from rich import progress

from tealightning.ablation import runner
from tealightning.ablation.runner import outcome_of, run_jobs, unfinished_jobs
from tealightning.ablation.worker import RECORD, write_json

HELPERS = Path(ablation_jobs.__file__).parent
PRELOAD = ["tealightning.ablation.worker", "ablation_jobs"]  # imported once, not by every process


def attempts(job):
    return (job.folder / "attempts").read_text().split()


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_alone_and_says_why(tmp_path, capsys):
    wanted = {"good": "finish", "bad": "raise", "silent": "exit", "shot": "kill", "last": "finish"}
    jobs = [job_of(tmp_path, name, does=does) for name, does in wanted.items()]
    outcomes = run_jobs(jobs, act, environments=[{}, {}], preload=PRELOAD)
    found = {folder.name: outcome for folder, outcome in outcomes.items()}
    assert {name: o.status for name, o in found.items()} == {
        "good": "finished", "bad": "failed", "silent": "failed", "shot": "failed", "last": "finished",
    }  # fmt: skip
    assert found["bad"].error == "ValueError: this one is meant to fail"
    assert "ended with exit code 7" in found["silent"].error
    assert "killed by SIGKILL" in found["shot"].error
    assert "ValueError: this one is meant to fail" in (tmp_path / "bad" / "log.txt").read_text()
    assert "good says hello" in (tmp_path / "good" / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert "bad, seed 0: FAILED: ValueError: this one is meant to fail" in printed
    assert "[5/5]" in printed
    assert [job.variant for job in unfinished_jobs(jobs)] == ["bad", "silent", "shot"]


def test_a_failed_run_is_tried_again_as_often_as_asked(tmp_path):
    jobs = [job_of(tmp_path, "once", does="once"), job_of(tmp_path, "never", does="raise")]
    outcomes = run_jobs(jobs, act, environments=[{}, {}], retries=1, preload=PRELOAD)
    assert {folder.name: outcome.status for folder, outcome in outcomes.items()} == {
        "once": "finished", "never": "failed",
    }  # fmt: skip
    assert [len(attempts(job)) for job in jobs] == [2, 2]


def test_record_of_another_configuration_is_no_result(tmp_path):
    job = job_of(tmp_path, "a")
    job.folder.mkdir()
    assert outcome_of(job).status == "missing"
    write_json(job.folder / RECORD, {"status": "finished", "hash": "another"})
    assert outcome_of(job).status == "missing"
    write_json(job.folder / RECORD, {"status": "finished", "hash": job.hash})
    assert outcome_of(job).status == "finished"
    (job.folder / RECORD).write_text('{"status": "fini')
    assert outcome_of(job).status == "missing"


def test_a_run_whose_folder_cannot_be_written_fails_alone(tmp_path):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    outcomes = run_jobs(
        [job_of(tmp_path, "blocked"), job_of(tmp_path, "free")], act, environments=[{}], preload=PRELOAD
    )
    assert {folder.name: outcome.status for folder, outcome in outcomes.items()} == {
        "blocked": "failed", "free": "finished",
    }  # fmt: skip
    assert "FileExistsError" in outcomes[tmp_path / "blocked"].error


def test_each_worker_has_its_own_environment(tmp_path):
    os.environ.pop("DEVICE_OF_TEST", None)
    jobs = [job_of(tmp_path, name) for name in "ab"]
    run_jobs(jobs, act, environments=[{"DEVICE_OF_TEST": "0"}, {"DEVICE_OF_TEST": "1"}])
    assert "DEVICE_OF_TEST" not in os.environ


@pytest.mark.parametrize(
    ("busy", "cores", "expected"),
    [(0, 2, 2), (100, 2, 1), (50, 2, 2), (80, 2, 1), (200, 2, 1), (200, 8, 6), (0, 1, 1)],
)
def test_runs_are_made_on_cores_that_are_free(tmp_path, monkeypatch, busy, cores, expected):
    """Two runs on two cores starve each other when something else has one; threads, which decide sums, stay the same.
    `busy`: of all cores together, in percent of one."""
    times = tmp_path / "stat"
    times.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 1 2 3\n")

    def later(seconds):
        idle = 1000 + 100 * cores - busy
        times.write_text(f"cpu  {100 + busy} 0 100 {idle} 0 0 0 0 0 0\ncpu0 1 2 3\n")

    monkeypatch.setattr(runner, "_CPU_TIMES", times)
    monkeypatch.setattr(runner.time, "sleep", later)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runner.environments_of(None) == [{"OMP_NUM_THREADS": "1"}] * expected


def test_runs_that_are_asked_for_share_the_cores(monkeypatch):
    monkeypatch.setattr(runner, "_idle_share", lambda: 0.0)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runner.environments_of(3) == [{"OMP_NUM_THREADS": "2"}] * 3


def test_a_bar_says_what_its_run_is_doing():
    told = [
        ({}, "starting"),
        ({"activity": "starting the engine"}, "starting the engine"),
        ({"phase": "evaluation", "done": 0, "total": 4}, "evaluation: starting the engine"),
        ({"activity": "generating"}, "evaluation: generating"),
        ({"phase": "training", "done": 1, "total": 9, "reward": 0.5}, "training, reward 0.500: generating"),
        ({"activity": "training"}, "training, reward 0.500"),
        ({"phase": "held-out", "done": 0, "total": None}, "held-out: training"),
        ({"activity": ""}, "held-out"),
    ]
    (ours, theirs), bars = Pipe(), progress.Progress(disable=True)
    process = SimpleNamespace(sentinel=theirs.fileno(), exitcode=None)
    one = runner._Running(None, 1, {}, process, ours, bars.add_task("a run", total=None, note="starting"))
    for message, note in told:
        theirs.send(message)
        runner._watch([one], bars)
        assert bars.tasks[0].fields["note"] == note
    assert (bars.tasks[0].completed, bars.tasks[0].total) == (0, 9)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_runs_end_with_the_command_however_it_ends(tmp_path, sent):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
    command = [sys.executable, str(HELPERS / "ablation_jobs.py"), str(tmp_path), "600"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = tmp_path / "sleeper" / "attempts"
    deadline = time.monotonic() + 240  # the imports alone take many seconds, on a busy machine minutes
    while not (started.exists() and started.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(started.read_text().split()[0])
    process.send_signal(sent)
    process.wait(30)
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(child)
    assert not (tmp_path / "sleeper" / RECORD).exists()


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
