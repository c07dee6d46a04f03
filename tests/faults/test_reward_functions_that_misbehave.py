"""A reward function that fails in every way, in its worker process: nothing mocked."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from playground_fits import fit
from reward_functions import FAULTS, score_of

from tealightning.rewards import FunctionReward

FUNCTION = f"{Path(__file__).parents[1] / 'helpers' / 'reward_functions.py'}:misbehaving"
# Those that no timeout needs to end, and those that one does.
QUICK = ["<raise>", "<exit>", "<kill>", "<segfault>", "<sys.exit>", "<memory>", "<short>", "<text>", "<nan>"]
ENDLESS = ["<hang>", "<regex>"]
HARMLESS = ["<slow>", "<loud>"]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def processes_of(pid):
    """The process and all that descend from it."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for child in children for one in processes_of(child))]


@pytest.fixture
def started():
    """Asks for the processes that descend from this one and were started since."""
    before = set(processes_of(os.getpid()))
    return lambda: [pid for pid in processes_of(os.getpid()) if pid not in before]


def wait_until_gone(pids, seconds=30.0):
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def completions_with(faults, count):
    """Every completion is another; those of `faults` are spread over them."""
    completions = [f"completion {i}" for i in range(count)]
    for n, fault in enumerate(faults):
        completions[(n * count) // len(faults) + 3] += fault
    return completions


@pytest.mark.fault(
    "a reward function that raises, crashes, is killed, hangs, is slow, returns too few values or no numbers",
    how="one completion in seven makes the function do it, in its process, in one batch of them all",
)
def test_every_fault_of_a_function_costs_the_completions_that_cause_it_and_nothing_else(injected, started):
    faults = [*QUICK, *ENDLESS, *HARMLESS]
    completions = completions_with(faults, 13 * 7)
    reward = FunctionReward(FUNCTION, timeout_seconds=3.0, deadline_seconds=200.0, on_error="unscored")
    with pytest.warns(UserWarning, match="reward function 'misbehaving' on"):
        scores = reward(["p"] * len(completions), completions, [{}] * len(completions))
    pids = started()
    reward.close()
    lost = [c for c in completions if any(fault in c for fault in QUICK + ENDLESS)]
    for completion, score in zip(completions, scores.total.tolist(), strict=True):
        assert math.isnan(score) if completion in lost else score == score_of(completion), completion
    counts = scores.counts["misbehaving"]
    assert counts["unscored"] == len(lost) - 1  # the NaN was a score
    assert counts["timeouts"] >= len(ENDLESS) and counts["crashes"] >= 4 and counts["errors"] >= 4
    wait_until_gone(pids)
    injected(times=len(faults), lost="the scores of the completions that cannot be scored: NaN, counted")


@pytest.mark.fault(
    "a reward function that hangs on every completion", how="it sleeps for an hour; the timeout is 1 second"
)
def test_a_function_that_always_hangs_is_given_up_in_bounded_time(injected):
    reward = FunctionReward(FUNCTION, timeout_seconds=1.0, deadline_seconds=3.0)
    started = time.monotonic()
    with pytest.warns(UserWarning, match="it took longer than 1 s"):
        scores = reward(["p"] * 64, ["<hang>"] * 64, [{}] * 64)
    assert time.monotonic() - started < 20.0
    assert torch.isnan(scores.total).all() and scores.counts["misbehaving"]["unscored"] == 64
    reward.close()
    injected(times=scores.counts["misbehaving"]["timeouts"], lost="the scores: NaN, counted")


@pytest.mark.parametrize("fault", ["<process>", *ENDLESS])
@pytest.mark.fault(
    "the trainer is killed while a reward function hangs",
    how="SIGKILL of the process; the function sleeps, or holds the interpreter, or waits for a process of its own",
)
def test_no_worker_outlives_a_trainer_that_is_killed(fault, tmp_path, injected):
    assert fault in FAULTS
    code = (
        "from tealightning.rewards import FunctionReward\n"
        f"reward = FunctionReward({FUNCTION!r}, timeout_seconds=3600.0)\n"
        "reward.setup(None)\n"
        "print('ready', flush=True)\n"
        f"reward(['p'], [{fault!r}], [{{}}])\n"
    )
    child_file = tmp_path / "child"
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"CHILD_FILE": str(child_file)},
        text=True,
    )
    try:
        assert trainer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30.0
        while fault == "<process>" and not (child_file.exists() and child_file.read_text()):
            assert time.monotonic() < deadline, "the function did not start its process"
            time.sleep(0.05)
        time.sleep(0.3)  # it is in the function now
        pids = processes_of(trainer.pid)
        assert len(pids) == (4 if fault == "<process>" else 3)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait(30.0)
        wait_until_gone(pids)
    finally:
        trainer.kill()
        trainer.stdout.close()
    injected(times=1, lost="no process is left")


@pytest.mark.fault("the process of a reward function is killed between steps", how="SIGKILL of it after each step")
def test_training_goes_on_when_the_worker_is_killed_and_ends_with_the_same_weights(playground, injected, started):
    from lightning.pytorch.callbacks import Callback

    killed = []

    class KillWorker(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            supervisor, worker = started()
            os.kill(worker, signal.SIGKILL)
            wait_until_gone([supervisor])
            killed.append(worker)

    function = FUNCTION.replace("misbehaving", "count_words")
    _, in_process = fit(playground, steps=3, reward=FunctionReward(function))
    reward = FunctionReward(function, timeout_seconds=60.0)
    _, record = fit(playground, steps=3, reward=reward, callbacks=[KillWorker()])
    reward.close()
    assert len(set(killed)) == 3
    assert record.series("rollout/reward_count_words_unscored") == [0.0] * 3
    assert torch.equal(record.weights, in_process.weights) and record.largest_move > 1e-4
    injected(times=3)
