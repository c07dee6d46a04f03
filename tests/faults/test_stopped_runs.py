"""Runs that are asked to end, that fail, and whose checkpoints are damaged."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from interrupted_runs import Run, assert_same, finished
from ranks import free_port


@pytest.fixture(scope="module")
def unbroken(playground, tmp_path_factory):
    return finished(Run(playground, tmp_path_factory.mktemp("unbroken")))


@pytest.fixture(scope="module")
def unbroken_of_two(playground, tmp_path_factory):
    return finished(Run(playground, tmp_path_factory.mktemp("unbroken_of_two"), ranks=2))


def told_to_go_on(text):
    """Arguments of the command that a run has printed."""
    (command,) = set(re.findall(r"^  (tealightning fit .*)$", text, re.MULTILINE))
    return shlex.split(command)[1:]


def stopped(run, signum, *ranks, fault):
    """The end of a run that got the signal in the middle of a step (the third) or evaluation."""
    started = run.start("--ckpt_path", "last", fault=fault | {"how": "wait", "seconds": 1.5})
    rank = fault.get("rank", 0)
    started.wait_for(run.folder / f"at_the_moment.{rank}")
    started.signal(signum, *ranks)
    return started.wait()


@pytest.mark.fault("SIGTERM, SIGINT", how="sent to a run during generation, backward and validation")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("signum", "phase", "step", "saved"),
    [(signal.SIGTERM, "generate", 4, 5), (signal.SIGINT, "backward", 6, 7), (signal.SIGTERM, "validation", 9, 9)],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    signum, phase, step, saved, playground, tmp_path, unbroken, injected
):
    run = Run(playground, tmp_path)
    ended = stopped(run, signum, fault={"phase": phase, "step": step})
    assert ended.status == 128 + signum, ended.text[-4000:]
    assert run.checkpoints()[0].name == f"step={saved:06d}.ckpt"
    assert told_to_go_on(ended.text) == [*run.args, "--ckpt_path", "last"]
    finished(run)
    assert_same(run, unbroken)
    injected(times=1)


@pytest.mark.fault("a second SIGTERM", how="sent while the step of the first one ends")
@pytest.mark.timeout(300)
def test_a_second_signal_ends_the_run_at_once(playground, tmp_path, injected):
    run = Run(playground, tmp_path)
    started = run.start(fault={"phase": "generate", "step": 3, "how": "wait", "seconds": 600.0})
    started.wait_for(tmp_path / "at_the_moment.0")
    started.signal(signal.SIGTERM)
    started.wait_for_text("stopping after this step")
    started.signal(signal.SIGTERM)
    assert started.wait().status == -signal.SIGTERM
    assert run.checkpoints()[0].name == "step=000002.ckpt"
    injected(times=1, lost="the steps since the last checkpoint, as asked for")


@pytest.mark.fault("SIGTERM, SIGINT with 2 ranks", how="DDP over gloo: sent to rank 1 alone, and to both")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("signum", "ranks", "phase", "step", "saved"),
    [(signal.SIGTERM, [1], "generate", 4, 5), (signal.SIGINT, [0, 1], "validation", 6, 6)],
)
def test_ranks_stop_at_the_same_step(
    signum, ranks, phase, step, saved, playground, tmp_path, unbroken_of_two, injected
):
    run = Run(playground, tmp_path, ranks=2)
    ended = stopped(run, signum, *ranks, fault={"phase": phase, "step": step, "rank": 1})
    assert ended.codes == [128 + signum, 0], ended.text[-4000:]
    assert run.checkpoints()[0].name == f"step={saved:06d}.ckpt"
    assert [len(run.steps(rank)) for rank in range(2)] == [saved, saved]
    assert told_to_go_on(ended.text) == [*run.args, "--ckpt_path", "last"]
    finished(run)
    assert_same(run, unbroken_of_two)
    injected(times=len(ranks))


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.fault(
    "a damaged newest checkpoint", how="5,000 bytes cut off its end, one bit changed in its middle, all bytes gone"
)
@pytest.mark.timeout(900)
def test_of_a_damaged_newest_checkpoint_the_one_before_is_used(playground, tmp_path, unbroken, injected):
    whole = Run(playground, tmp_path / "whole")
    assert whole.fit(fault={"phase": "batch", "step": 6}).status == -9
    for damage, reason in ((cut, "truncated"), (flip, "checksum"), (empty, "truncated")):
        run = Run(playground, tmp_path / damage.__name__)
        shutil.copytree(
            whole.folder, run.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run.yaml", "log_*")
        )
        newest, before = run.checkpoints()
        damage(newest)
        ended = run.fit("--ckpt_path", "last")
        assert ended.status == 0, ended.text[-4000:]
        assert re.search(f"{re.escape(str(newest))} is damaged and not used: .*{reason}", ended.text)
        assert f"from the checkpoint path at {before}" in ended.text
        assert_same(run, unbroken)
    injected(times=3)


@pytest.mark.fault("all checkpoints damaged", how="a bit changed in each")
@pytest.mark.timeout(300)
def test_if_no_checkpoint_is_good_the_run_refuses_to_start(playground, tmp_path, injected):
    run = Run(playground, tmp_path)
    assert run.fit(fault={"phase": "batch", "step": 4}).status == -9
    for path in run.checkpoints():
        flip(path)
    for how in ("last", str(run.checkpoints()[0])):
        ended = run.fit("--ckpt_path", how)
        assert ended.status == 2
        for path in run.checkpoints() if how == "last" else run.checkpoints()[:1]:
            assert str(path) in ended.text
        assert "checksum" in ended.text and "Traceback" not in ended.text
    injected(times=2, lost="nothing that was not lost before: the run says so and starts nothing")


@pytest.mark.fault(
    "an exception in a step",
    how="raised in generation, in the reward, in backward, before the optimizer step, in "
    "validation and by a callback after the step",
)
@pytest.mark.timeout(1500)
def test_after_an_exception_the_last_completed_step_is_saved_and_repeated(playground, tmp_path, unbroken, injected):
    run = Run(playground, tmp_path)
    faults = [("generate", 3, 3), ("reward", 5, 5), ("validation", 6, 6), ("backward", 7, 7), ("optimizer", 9, 9)]
    for phase, step, saved in [*faults, ("batch end", 10, 11)]:
        ended = run.fit("--ckpt_path", "last", fault={"phase": phase, "step": step, "how": "raise"})
        assert ended.status == 1 and f"RuntimeError: meant to fail in {phase}" in ended.text, ended.text[-4000:]
        assert f"Step {saved} is saved in" in ended.text, ended.text[-4000:]
        assert run.checkpoints()[0].name == f"step={saved:06d}.ckpt"
        assert told_to_go_on(ended.text) == [*run.args, "--ckpt_path", "last"]
    finished(run)
    assert_same(run, unbroken)
    injected(times=len(faults) + 1)


@pytest.mark.fault("an exception with rollouts one step ahead", how="raised in backward, with rollout.steps_ahead=1")
@pytest.mark.timeout(900)
def test_after_an_exception_rollouts_that_were_sampled_ahead_are_trained_on(playground, tmp_path, injected):
    settings = {"rollout": {"steps_ahead": 1}, "model": {"init_args": {"loss": {"importance_cap": 2.0}}}}
    unbroken = finished(Run(playground, tmp_path / "unbroken", **settings))
    run = Run(playground, tmp_path / "failed", **settings)
    for step in (3, 7):
        ended = run.fit("--ckpt_path", "last", fault={"phase": "backward", "step": step, "how": "raise"})
        assert f"Step {step} is saved in" in ended.text, ended.text[-4000:]
    finished(run)
    assert_same(run, unbroken)
    injected(times=2)


@pytest.mark.fault("an exception in the middle of a step", how="raised in backward of the second of 2 inner epochs")
@pytest.mark.timeout(600)
def test_weights_in_the_middle_of_a_step_are_not_saved(playground, tmp_path, injected):
    run = Run(playground, tmp_path, model={"init_args": {"inner_epochs": 2}})
    fault = {"phase": "backward", "step": 3, "time": 2, "how": "raise"}
    ended = run.fit(fault=fault)
    assert "meant to fail in backward" in ended.text
    newest = run.checkpoints()[0]
    assert newest.name == "step=000004.ckpt"  # two rollout steps
    assert (
        f"Nothing was saved: the weights are in the middle of a step. The newest checkpoint is {newest}" in ended.text
    )
    injected(times=1, lost="the steps since the last checkpoint, which are repeated")


@pytest.mark.fault(
    "an exception on one of 2 ranks", how="DDP over gloo: raised in the reward of rank 1, then of rank 0"
)
@pytest.mark.timeout(900)
def test_an_exception_on_one_rank_loses_no_step(playground, tmp_path, unbroken_of_two, injected):
    run = Run(playground, tmp_path, ranks=2)
    for rank, step in ((1, 3), (0, 7)):
        ended = run.fit("--ckpt_path", "last", fault={"phase": "reward", "step": step, "rank": rank, "how": "raise"})
        assert all(ended.codes), ended.codes
        assert f"Step {step} is saved in" in ended.text, ended.text[-4000:]
        assert run.checkpoints()[0].name == f"step={step:06d}.ckpt"
    finished(run)
    assert_same(run, unbroken_of_two)
    injected(times=2)


FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.mark.fault("SIGTERM with sharded weights", how="FSDP2 on 2 ranks with a vLLM engine each: sent to rank 1 alone")
@pytest.mark.timeout(1500)
def test_a_run_with_sharded_weights_stops_and_goes_on(playground, tmp_path, injected):
    settings = {
        "rollout": {"engine": {"class_path": "vllm_engine"}},
        "trainer": {"strategy": FSDP2, "max_steps": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0},
    }
    unbroken = finished(Run(playground, tmp_path / "unbroken", ranks=2, **settings), timeout=600)
    run = Run(playground, tmp_path / "stopped", ranks=2, **settings)
    ended = stopped(run, signal.SIGTERM, 1, fault={"phase": "backward", "step": 0, "rank": 1})
    assert ended.codes == [143, 0], ended.text[-4000:]
    (folder,) = run.checkpoints()
    assert folder.name == "step=000001.ckpt" and (folder / "checksums.json").is_file()
    finished(run, timeout=600)
    assert [run.steps(rank) for rank in range(2)] == [unbroken.steps(rank) for rank in range(2)]
    assert run.policy() == unbroken.policy()
    injected(times=1)


@pytest.mark.fault("Ctrl-C in a terminal", how="SIGINT to `tealightning fit` and to the rank that it has started")
@pytest.mark.timeout(900)
def test_the_command_with_two_ranks_of_its_own_stops_at_ctrl_c(playground, tmp_path, unbroken_of_two, injected):
    """The command line as a user has it, without the helper's shared imports."""
    run = Run(playground, tmp_path, ranks=2)
    environment = os.environ | {"FAULT": json.dumps({"phase": "generate", "step": 4, "how": "wait", "seconds": 3.0})}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, "-m", "tealightning", *run.args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "at_the_moment.0").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, output[-4000:]
    assert run.checkpoints()[0].name == "step=000005.ckpt"
    assert told_to_go_on(output) == [*run.args, "--ckpt_path", "last"]
    finished(run)
    assert_same(run, unbroken_of_two)
    injected(times=1)
