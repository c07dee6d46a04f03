"""Rollouts of the next step while this one trains, with an engine that samples in a thread from weights of its own."""

import copy
import threading
import time

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from playground_fits import fit, module_of, rollout_of

from tealightning import PolicyGradientLoss
from tealightning.rollouts import RolloutEngine, TransformersEngine

STEPS = 6
PROMPTS = 12  # 3 steps of 4 in an epoch: the next step's prompts may be of the next epoch


class CopyEngine(RolloutEngine):
    """Samples from a copy of the policy that only a sync changes."""

    is_concurrent = True

    def __init__(self):
        self.engine = TransformersEngine()
        self.in_use = threading.Lock()
        self.begun: list[tuple[float, str]] = []
        self.seconds = 0.0

    def start(self, context):
        context.policy = copy.deepcopy(context.policy)
        self.weights = dict(context.policy.named_parameters())
        self.engine.start(context)

    def generate(self, *args, **kwargs):
        assert self.in_use.acquire(blocking=False), "two generations at a time"
        try:
            self.begun.append((time.perf_counter(), threading.current_thread().name))
            time.sleep(self.seconds)
            return self.engine.generate(*args, **kwargs)
        finally:
            self.in_use.release()

    def sync_weights(self, weights):
        assert self.in_use.acquire(blocking=False), "new weights in the middle of a generation"
        for name, weight in weights:
            if name in self.weights:
                self.weights[name].data.copy_(weight)
        self.in_use.release()

    def close(self):
        self.engine.close()


def train(playground, *, ahead=1, lr=1e-3, engine=None, reward=None, callbacks=(), steps=STEPS, cap=2.0, **kwargs):
    return fit(
        playground,
        steps=steps,
        engine=engine or CopyEngine(),
        reward=reward,
        module=module_of(playground, lr=lr, loss=PolicyGradientLoss(importance_cap=cap)),
        callbacks=callbacks,
        data={"train": f"{playground / 'prompts' / 'train.jsonl'}@[:{PROMPTS}]"},
        rollout={"steps_ahead": ahead},
        **kwargs,
    )


def test_with_weights_that_stay_it_is_the_on_policy_run(playground):
    """Also over epochs, and with an evaluation after each step that the engine has to become idle for."""
    settings = {"lr": 0.0, "limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    _, ahead = train(playground, **settings)
    _, on_policy = train(playground, ahead=0, **settings)
    assert [step["ids"] for step in ahead.steps] == [step["ids"] for step in on_policy.steps]
    assert [step["tokens"] for step in ahead.steps] == [step["tokens"] for step in on_policy.steps]
    key = "val/best_of_4"
    assert [v["metrics"][key] for v in ahead.validations] == [v["metrics"][key] for v in on_policy.validations]


def test_rollouts_are_of_the_weights_one_step_before(playground):
    _, record = train(playground)
    assert record.series("rollout/staleness") == [0.0] + [1.0] * (STEPS - 1)
    assert record.series("rollout/step") == list(range(STEPS))
    fresh, *stale = record.series("rollout/log_prob_abs_diff_max")
    assert fresh < 1e-4 and min(stale) > 1e-3
    _, again = train(playground)
    assert [step["tokens"] for step in again.steps] == [step["tokens"] for step in record.steps]


class WaitForNext(Callback):
    """Lets no step end before the next one's rollouts are being generated."""

    def __init__(self, engine):
        self.engine = engine
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        expected = min(STEPS, self.steps + 1)
        deadline = time.perf_counter() + 10
        while len(self.engine.begun) < expected:
            assert time.perf_counter() < deadline, "the next step's rollouts wait for this step to end"
            time.sleep(0.01)


def test_the_next_step_is_generated_while_this_one_trains(playground):
    engine = CopyEngine()
    engine.is_scripted = True  # no probes: only what steps train on is counted
    train(playground, engine=engine, callbacks=[WaitForNext(engine)])
    names = [name for _, name in engine.begun]
    assert len(names) == STEPS, "nothing is generated that no step trains on"
    assert names[0] == "MainThread" and set(names[1:]) == {"rollouts one step ahead"}


def test_an_error_in_the_thread_ends_the_run_at_the_next_step(playground):
    def fails_later(prompts, completions, metadata, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("the reward is gone")
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match="ConnectionError on 32 completions: the reward is gone"):
        train(playground, reward=fails_later)


def test_a_resumed_run_skips_and_repeats_no_prompt(playground, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    _, unbroken = train(playground)
    _, first = train(playground, steps=2, callbacks=[saver], enable_checkpointing=True)
    _, second = train(playground, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert [step["ids"] for step in first.steps + second.steps] == [step["ids"] for step in unbroken.steps]
    assert second.series("rollout/staleness")[0] == 0.0


def test_what_cannot_run_ahead_is_refused(playground):
    with pytest.raises(ValueError, match="VLLMServerEngine"):
        rollout_of(playground, TransformersEngine(), steps_ahead=1)
    with pytest.raises(ValueError, match="steps_ahead must be 0 or 1, got 2"):
        rollout_of(playground, CopyEngine(), steps_ahead=2)
    with pytest.raises(ValueError, match=r"set model.loss.importance_cap"):
        train(playground, cap=None)
