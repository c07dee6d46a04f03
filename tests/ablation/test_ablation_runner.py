import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablation_jobs
import pytest
from ablation_jobs import act, job_of

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
