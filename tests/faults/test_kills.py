"""A run that is killed with SIGKILL, at whatever moment, and started again with `--ckpt_path last` is the unbroken run.

Peers lose this way what they had sampled, or train on it twice: OpenRLHF #1322, #1103, open-instruct #1523.
"""

import random
import time

import pytest
from interrupted_runs import Run, assert_same, finished

KILLED = -9

PHASES = [
    ("generate", 0),
    ("backward", 1),
    ("before the rename", 2),
    ("sync", 3),
    ("half a checkpoint", 4),
    ("optimizer", 4),
    ("after the rename", 6),
    ("validation", 6),
    ("reward", 6),
    ("batch end", 7),
    ("checkpoint", 8),
    ("validation", 9),
    ("epoch", 10),
    ("sync", 11),
    ("before the rename", 12),
    ("validation", 12),
]

PHASES_OF_RANKS = [
    ("generate", 1, 1),
    ("backward", 2, 0),
    ("half a checkpoint", 4, 0),
    ("sync", 5, 1),
    ("validation", 6, 1),
    ("optimizer", 7, 0),
    ("after the rename", 8, 0),
]


@pytest.fixture(scope="module")
def unbroken(playground, tmp_path_factory):
    return finished(Run(playground, tmp_path_factory.mktemp("unbroken")))


@pytest.mark.fault(
    "SIGKILL in one process",
    how="the process kills itself during generation, scoring, backward, weight sync, the "
    "optimizer step, validation and the writing of a checkpoint, and is started again with --ckpt_path last",
)
@pytest.mark.timeout(1500)
def test_killed_at_every_phase_it_is_the_unbroken_run(playground, tmp_path, unbroken, injected):
    """Peers dropped or repeated prompts: OpenRLHF #1322, #1103, open-instruct #1523."""
    run = Run(playground, tmp_path)
    for phase, step in PHASES:
        ended = run.fit("--ckpt_path", "last", fault={"phase": phase, "step": step})
        assert ended.status == KILLED, f"{phase} of step {step}: {ended.text[-4000:]}"
    finished(run)
    assert_same(run, unbroken)
    injected(times=len(PHASES))


@pytest.mark.fault("SIGKILL in one process", how="kill -9 from outside at random (seeded) moments, --ckpt_path last")
@pytest.mark.timeout(1500)
def test_killed_at_random_moments_it_is_the_unbroken_run(playground, tmp_path, unbroken, injected):
    began = time.monotonic()
    finished(Run(playground, tmp_path / "timed"))
    seconds = time.monotonic() - began  # on this machine as it is now: later moments find a run that has ended
    run, moments = Run(playground, tmp_path / "killed"), random.Random(0)
    kills = 0
    for _ in range(6):
        started = run.start("--ckpt_path", "last")
        time.sleep(moments.uniform(0.05, 0.5) * seconds)
        kills += started.kill().status == KILLED
    finished(run)
    assert_same(run, unbroken)
    injected(times=kills)


@pytest.mark.fault(
    "SIGKILL of one of 2 ranks, or of both",
    how="DDP over gloo: a rank kills itself during generation, backward, weight "
    "sync, the optimizer step, validation and the writing of a checkpoint; then both are killed from outside",
)
@pytest.mark.timeout(1500)
def test_two_ranks_that_are_killed_are_the_unbroken_run(playground, tmp_path, injected):
    unbroken = finished(Run(playground, tmp_path / "unbroken", ranks=2))
    run, moments = Run(playground, tmp_path / "killed", ranks=2), random.Random(1)
    for phase, step, rank in PHASES_OF_RANKS:
        ended = run.fit("--ckpt_path", "last", fault={"phase": phase, "step": step, "rank": rank})
        assert ended.codes[rank] == KILLED and ended.codes[1 - rank] not in (0, KILLED), ended.text[-4000:]
    started = run.start("--ckpt_path", "last")
    time.sleep(moments.uniform(1.0, 3.0))
    kills = started.kill().codes.count(KILLED)
    finished(run)
    assert_same(run, unbroken)
    injected(times=len(PHASES_OF_RANKS) + kills)


@pytest.mark.fault(
    "SIGKILL with rollouts one step ahead",
    how="rollout.steps_ahead=1: killed while the rollouts of the next step are "
    "sampled or trained on; the checkpoint holds those that were sampled and not trained on",
)
@pytest.mark.timeout(900)
def test_rollouts_that_were_sampled_ahead_are_trained_on_once(playground, tmp_path, injected):
    """From the same weights as in the unbroken run: sampled anew they would be of newer ones. Peers lost such rollouts
    or trained on them twice (open-instruct #1523)."""
    settings = {"rollout": {"steps_ahead": 1}, "model": {"init_args": {"loss": {"importance_cap": 2.0}}}}
    unbroken = finished(Run(playground, tmp_path / "unbroken", **settings))
    assert [step["weights_version"] for step in unbroken.steps()] == [0, *range(11)]
    run = Run(playground, tmp_path / "killed", **settings)
    faults = [("backward", 3), ("generate", 5), ("validation", 6), ("optimizer", 9), ("batch end", 11)]
    for phase, step in faults:
        ended = run.fit("--ckpt_path", "last", fault={"phase": phase, "step": step})
        assert ended.status == KILLED, ended.text[-4000:]
    finished(run)
    assert_same(run, unbroken)
    injected(times=len(faults))


@pytest.mark.fault("SIGKILL with vLLM", how="VLLMEngine on a CPU: killed during generation, weight sync and validation")
@pytest.mark.timeout(1500)
def test_with_vllm_a_killed_run_samples_what_the_unbroken_one_samples(playground, tmp_path, injected):
    settings = {"rollout": {"engine": {"class_path": "vllm_engine"}}, "trainer": {"max_steps": 6}}
    unbroken = finished(Run(playground, tmp_path / "unbroken", **settings), timeout=600)
    run = Run(playground, tmp_path / "killed", **settings)
    faults = [("generate", 2), ("validation", 3), ("sync", 5)]
    for phase, step in faults:
        ended = run.fit("--ckpt_path", "last", fault={"phase": phase, "step": step}, timeout=600)
        assert ended.status == KILLED, ended.text[-4000:]
    finished(run, timeout=600)
    assert_same(run, unbroken)
    injected(times=len(faults))
