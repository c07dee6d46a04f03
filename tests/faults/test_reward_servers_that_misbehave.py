"""A reward server that fails in every way: real sockets on the loopback interface, nothing mocked."""

import math
import threading
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from playground_fits import data_of, fit, module_of, record_of, rollout_of, trainer_of
from reward_server import reward_server, score_of

from tealightning.callbacks.rollout_checks import UnscorableError
from tealightning.reliability.checkpoint import ResumableCheckpoint
from tealightning.rewards import HTTPReward

SERVER_FAULTS = {
    **dict.fromkeys(("500", "503", "429", "reset", "reset_in_body", "truncated", "garbage"), 0.025),
    **dict.fromkeys(("wrong_ids", "one_wrong_id", "duplicated_ids", "missing_ids", "no_numbers", "by_position"), 0.02),
    "shuffled": 0.1,
    "slow": 0.005,
    "hang": 0.003,
    "drip": 0.002,
}
QUICK = {"backoff_seconds": 0.01, "max_backoff_seconds": 0.1}


def items(count, start=0):
    """Prompts, completions and metadata; every second prompt is a chat."""
    prompts = [f"prompt {i}" if i % 2 else [{"role": "user", "content": f"prompt {i}"}] for i in range(count)]
    return prompts, [f"completion {i + start} é\u2028" for i in range(count)], [{"row": i} for i in range(count)]


def expected(prompts, completions):
    return [score_of({"prompt": p, "completion": c}) for p, c in zip(prompts, completions, strict=True)]


def in_parts(reward, columns, size=500):
    """The scores of all, in calls of `size`, and what was counted."""
    scores, counts = [], {}
    for start in range(0, len(columns[0]), size):
        part = reward(*(column[start : start + size] for column in columns))
        scores += part.total.tolist()
        for key, count in part.counts["http"].items():
            counts[key] = counts.get(key, 0) + count
    return scores, counts


@pytest.mark.fault(
    "a reward server that answers with 5xx, 429, garbage, wrong, double and missing ids, resets, hangs and trickles",
    how="a real loopback server does one of 17 things to 4 in 10 of more than 5,000 requests, seeded",
)
def test_thousands_of_requests_to_a_server_with_every_fault_lose_and_misplace_no_score(injected):
    columns = items(12_000)
    state = torch.get_rng_state()
    with reward_server(SERVER_FAULTS) as server:
        reward = HTTPReward(
            server.url, batch_size=3, concurrency=16, timeout_seconds=1.0, deadline_seconds=120.0, retries=30, **QUICK
        )
        scores, counts = in_parts(reward, columns)
    assert server.requests >= 5000 and set(server.injected) == set(SERVER_FAULTS)
    assert server.most_at_a_time <= 16 + server.injected["hang"] + server.injected["drip"]  # it does not see timeouts
    assert scores == expected(*columns[:2])
    assert counts["unscored"] == 0 and counts["timeouts"] >= server.injected["hang"] > 0
    assert all(len(bodies) == 1 for bodies in server.bodies.values()), "one idempotency key, two requests"
    assert torch.equal(torch.get_rng_state(), state)
    injected(times=sum(server.injected.values()))


@pytest.mark.fault(
    "the reward server restarts",
    how="its port is closed for half a second and every open connection reset, again and again",
)
def test_a_server_that_restarts_costs_nothing(injected):
    columns = items(1600)
    finished = threading.Event()
    restarts = 0
    with reward_server({"slow": 0.2}) as server:
        reward = HTTPReward(server.url, batch_size=4, concurrency=8, deadline_seconds=120.0, retries=0, **QUICK)

        def restart_again_and_again():
            nonlocal restarts
            while not finished.wait(0.1):
                server.restart(gone_seconds=0.5)
                restarts += 1

        thread = threading.Thread(target=restart_again_and_again)
        thread.start()
        try:
            scores, counts = in_parts(reward, columns, size=800)
        finally:
            finished.set()
            thread.join(30.0)
    assert restarts >= 2 and counts["errors"] > 0
    assert scores == expected(*columns[:2])
    injected(times=restarts)


@pytest.mark.fault(
    "a completion at which the reward server always fails", how="the server answers 500 to any batch that holds it"
)
def test_a_completion_that_the_server_fails_at_costs_itself_and_is_counted(injected):
    prompts, completions, metadata = items(640)
    bad = set(range(5, 640, 64))
    completions = [f"{c} <bad>" if i in bad else c for i, c in enumerate(completions)]
    with reward_server({"500": 0.02, "reset": 0.02}, poison="<bad>") as server:
        reward = HTTPReward(server.url, batch_size=32, retries=2, deadline_seconds=60.0, **QUICK)
        with pytest.warns(UserWarning, match=r"no score for 10 completions: .* answered 500: poisoned"):
            scores = reward(prompts, completions, metadata)
    right = expected(prompts, completions)
    assert {i for i, score in enumerate(scores.total.tolist()) if math.isnan(score)} == bad
    assert all(score == right[i] for i, score in enumerate(scores.total.tolist()) if i not in bad)
    assert scores.counts["http"]["unscored"] == len(bad)
    injected(times=len(bad), lost="the scores of the completions that cannot be scored: NaN, counted")


@pytest.mark.fault("the reward server hangs for good", how="it stops answering half-way through a call")
def test_scores_that_came_before_the_server_hung_are_kept_and_the_call_ends_at_its_deadline(injected):
    columns = items(400)
    gone = threading.Event()

    def score(item):
        if server.requests > 50:
            gone.wait(60.0)
        return score_of(item)

    with reward_server(score=score) as server:
        reward = HTTPReward(
            server.url, batch_size=4, concurrency=4, timeout_seconds=1.0, deadline_seconds=3.0, retries=1, **QUICK
        )
        started = time.monotonic()
        with pytest.warns(UserWarning, match=r"no score for \d+ completions: .* did not answer within 1 s"):
            scores = reward(*columns)
        assert time.monotonic() - started < 15.0
        again = time.monotonic()
        reward(*columns)
        assert time.monotonic() - again < 15.0
        gone.set()
    right = expected(*columns[:2])
    kept = [i for i, score in enumerate(scores.total.tolist()) if not math.isnan(score)]
    assert 100 <= len(kept) <= 204 and all(scores.total[i] == right[i] for i in kept)
    assert scores.counts["http"]["unscored"] == 400 - len(kept)
    injected(times=1, lost="the scores that the server never gave: NaN, counted; those before it hung are kept")


def letters(item):
    return float(item["completion"].count("e"))


@pytest.mark.fault("a flaky reward server during training", how="4 in 10 of its answers fail; 4 training steps")
def test_training_with_a_flaky_server_ends_with_the_weights_of_a_healthy_one(playground, injected):
    records, faults = [], 0
    for kinds in ({}, SERVER_FAULTS | {"hang": 0.0}):
        with reward_server(kinds, score=letters) as server:
            reward = HTTPReward(server.url, batch_size=2, retries=30, deadline_seconds=120.0, **QUICK)
            _, record = fit(playground, steps=4, reward=reward)
            records.append(record)
            faults += sum(server.injected.values())
    healthy, flaky = records
    assert sum(flaky.series("rollout/reward_http_retries")) > 10
    assert sum(flaky.series("rollout/reward_http_unscored")) == 0
    assert healthy.largest_move > 1e-4
    assert torch.equal(healthy.weights, flaky.weights)
    injected(times=faults)


class StopServer(Callback):
    """The server is gone after some steps."""

    def __init__(self, server, after_steps):
        self.server = server
        self.after_steps = after_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after_steps:
            self.server.stop()


@pytest.mark.parametrize("score_as_finished", [False, True])
@pytest.mark.fault("the reward server dies for good during training", how="its port is closed after the second step")
def test_training_stops_with_a_clear_error_when_the_server_is_gone_and_goes_on_when_it_is_back(
    playground, tmp_path, score_as_finished, injected
):
    def trained(*callbacks, folder, ckpt_path=None):
        reward = HTTPReward(server.url, batch_size=16, deadline_seconds=2.0, **QUICK)
        rollout = rollout_of(playground, reward=reward, score_as_finished=score_as_finished)
        saver = ResumableCheckpoint()
        settings = {"default_root_dir": folder, "enable_checkpointing": True}
        trainer = trainer_of(rollout, *callbacks, saver, max_steps=4, **settings)
        started = time.monotonic()
        try:
            trainer.fit(module_of(playground), datamodule=data_of(playground), ckpt_path=ckpt_path)
        finally:
            assert time.monotonic() - started < 60.0
        return record_of(trainer)

    with reward_server(score=letters) as server:
        unbroken = trained(folder=tmp_path / "unbroken")
        with (
            pytest.warns(UserWarning, match="no score for"),
            pytest.raises(UnscorableError, match=r"32 of the 32 completions of a training step.*cannot be reached"),
        ):
            trained(StopServer(server, after_steps=2), folder=tmp_path / "broken")
        (checkpoint,) = tmp_path.glob("broken/**/step=000002.ckpt")
        assert not list(tmp_path.glob("broken/**/step=000003.ckpt"))
        server.start()
        resumed = trained(folder=tmp_path / "resumed", ckpt_path=str(checkpoint))
    assert len(resumed.steps) == 2 and resumed.largest_move > 1e-4
    assert torch.equal(resumed.weights, unbroken.weights)
    injected(times=1)
