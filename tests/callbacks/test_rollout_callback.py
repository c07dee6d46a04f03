from functools import partial

import pytest
import torch
from copying_engine import CopyingEngine
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    WeightAveraging,
)
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of

from tealightning.registry import register
from tealightning.reliability.fingerprint import fingerprint
from tealightning.rewards.base import REWARDS, Reward
from tealightning.rollouts.base import ENGINES, EngineContext, RolloutEngine
from tealightning.types import Completion


class CountingEngine(RolloutEngine):
    """Answers with the tokens 5 and 6, and keeps what it was asked."""

    is_scripted = True

    def __init__(self, *, shares: bool = False) -> None:
        self.calls: list[str] = []
        self.seeds: list[tuple[int, ...]] = []
        self.num_samples: list[int] = []
        self.context: EngineContext | None = None
        self.shares = shares

    @property
    def shares_weights(self) -> bool:  # a class attribute of real engines
        return self.shares

    def start(self, context):
        self.calls.append("start")
        self.context = context

    def generate(self, prompt_token_ids, *, num_samples, sampling, seeds):
        self.calls.append("generate")
        self.seeds.append(tuple(seeds))
        self.num_samples.append(num_samples)
        answer = Completion(token_ids=[5, 6], log_probs=[-1.0, -1.0], text="five six", truncated=False)
        return [[answer] * num_samples for _ in prompt_token_ids]

    def sync_weights(self, weights):
        self.calls.append("sync")
        self.weights = dict(weights)

    def close(self):
        self.calls.append("close")


class RowReward(Reward):
    """Row i scores i; raises at call `fails_at`."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.num_calls = 0
        self.closed = 0

    def score(self, prompts, completions, metadata):
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise ValueError("no score today")
        return [float(i) for i in range(len(completions))]

    def close(self):
        self.closed += 1


def test_an_engine_and_a_reward_register_by_name(monkeypatch):
    monkeypatch.setattr(ENGINES, "_classes", dict(ENGINES._classes))
    monkeypatch.setattr(REWARDS, "_classes", dict(REWARDS._classes))
    register(CountingEngine)
    register(RowReward)
    assert isinstance(ENGINES.build("counting_engine"), CountingEngine)
    assert isinstance(REWARDS.build("row_reward"), RowReward)


def test_weights_are_synced_when_they_changed_and_only_then(playground):
    """A validation of two batches before training, three steps, and a validation after the third: none between batches
    that see the same weights."""
    engine = CountingEngine()
    validation = {"num_sanity_val_steps": -1, "limit_val_batches": 2, "val_check_interval": 3}
    fit(playground, steps=3, engine=engine, reward=RowReward(), check_val_every_n_epoch=None, **validation)
    val, step = ["sync", "generate", "generate"], ["sync", "generate"]
    assert engine.calls == ["start", *val, "generate", *step, *step, *val]  # no probe: it is scripted
    assert "lm_head.weight" in engine.weights  # tied to the embeddings, under both names


def test_an_engine_that_shares_weights_is_never_synced(playground):
    engine = CountingEngine(shares=True)
    fit(playground, steps=2, engine=engine, reward=RowReward())
    assert engine.calls == ["start", "generate", "generate"]


def test_the_engine_has_the_trained_weights(playground):
    """Peers sampled from stale weights without noticing (verl #7495, TRL #5312)."""
    engine = CountingEngine()
    trainer, _ = fit(playground, steps=2, engine=engine, reward=RowReward())
    assert engine.context.policy is trainer.lightning_module.policy
    trained = dict(trainer.lightning_module.policy.named_parameters(remove_duplicate=False))
    assert engine.weights.keys() == trained.keys()


def test_seeds_differ_between_steps_and_are_those_of_the_first_validation_in_every_validation(playground):
    engine = CountingEngine()
    validation = {"num_sanity_val_steps": -1, "limit_val_batches": 1, "val_check_interval": 1}
    fit(playground, steps=2, engine=engine, reward=RowReward(), check_val_every_n_epoch=None, **validation)
    before, step_1, after_1, step_2, after_2 = engine.seeds
    assert before == after_1 == after_2
    assert len({*before, *step_1, *step_2}) == 12  # 4 prompts each, no two alike
    assert engine.num_samples == [4, 8, 4, 8, 4]  # max(ns) in validation, group_size in training


def test_seeds_are_those_of_the_run_and_of_the_setting(playground, monkeypatch):
    def seeds(run_seed, setting=None):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(run_seed))
        engine = CountingEngine()
        fit(playground, steps=1, engine=engine, reward=RowReward(), rollout={"seed": setting})
        return engine.seeds

    assert seeds(0) == seeds(0)
    assert seeds(0) != seeds(1)
    assert seeds(0, setting=7) == seeds(1, setting=7)


def test_group_size_is_checked_before_a_model_is_loaded(playground):
    engine = CountingEngine()
    module = module_of(playground, estimator="tea")
    trainer = trainer_of(rollout_of(playground, engine, RowReward(), group_size=4), max_steps=1)
    with pytest.raises(ValueError, match="tea needs at least 5 rollouts a prompt, got group_size=4"):
        trainer.fit(module, datamodule=data_of(playground))
    assert module.policy is None
    assert "start" not in engine.calls


def test_group_size_does_not_matter_to_an_evaluation(playground):
    engine = CountingEngine()
    trainer = trainer_of(rollout_of(playground, engine, RowReward(), group_size=4), limit_val_batches=1)
    trainer.validate(module_of(playground, estimator="tea"), datamodule=data_of(playground), verbose=False)
    assert engine.num_samples == [4]


def test_an_exception_closes_engine_and_reward(playground):
    engine, reward = CountingEngine(), RowReward(fails_at=2)
    with pytest.raises(ValueError, match="no score today"):
        fit(playground, steps=3, engine=engine, reward=reward)
    assert engine.calls[-1] == "close"
    assert reward.closed == 1


def test_a_run_without_error_keeps_the_engine_for_the_next_stage(playground):
    engine = CountingEngine()
    callback = rollout_of(playground, engine, RowReward())
    trainer = trainer_of(callback, max_steps=1, limit_val_batches=1)
    module, data = module_of(playground), data_of(playground)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    assert engine.calls.count("start") == 1 and "close" not in engine.calls
    callback.close()
    assert engine.calls[-1] == "close"


def test_rollout_step_is_saved_and_counts_batches_not_optimizer_steps(playground, tmp_path):
    module = module_of(playground, inner_epochs=2)
    trainer, record = fit(playground, steps=4, engine=CountingEngine(), reward=RowReward(), module=module)
    assert record.series("rollout/step") == [0, 1]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert state["callbacks"]["RolloutCallback"] == {"rollout_step": 2}

    resumed = fit(
        playground,
        steps=5,
        engine=(engine := CountingEngine()),
        reward=RowReward(),
        ckpt_path=str(tmp_path / "last.ckpt"),
    )[1]
    assert resumed.series("rollout/step") == [2]
    third = CountingEngine()
    fit(playground, steps=3, engine=third, reward=RowReward())
    assert engine.seeds == third.seeds[2:]


def test_longest_prompt_and_completion_that_the_engine_prepares_for(playground):
    def prepared(rollout=None, data=None):
        engine = CountingEngine()
        fit(playground, steps=1, engine=engine, reward=RowReward(), rollout=rollout, data=data)
        return engine.context.max_model_len

    holds = module_of(playground)
    holds.configure_model()
    assert prepared() == holds.policy.config.max_position_embeddings
    assert prepared(data={"max_prompt_tokens": 20}) == 32  # and 12 new tokens
    assert prepared(rollout={"max_model_len": 50}) == 50


class Recording(CopyingEngine):
    """Notes at each generation whether it holds the trainer's weights, to the last bit."""

    def __init__(self):
        super().__init__()
        self.is_fresh: list[bool] = []

    def start(self, context):
        self.live = context.policy
        super().start(context)

    def generate(self, *args, **kwargs):
        self.is_fresh.append(fingerprint(self._context.policy) == fingerprint(self.live))
        return super().generate(*args, **kwargs)


class Edits(Callback):
    """Changes the weights by hand where no optimizer step is counted."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            pl_module.policy.lm_head.weight.data.mul_(1.01)
        if batch_idx == 2:
            pl_module.policy.load_state_dict({k: v * 0.99 for k, v in pl_module.policy.state_dict().items()})

    def on_validation_epoch_start(self, trainer, pl_module):
        pl_module.policy.lm_head.weight.data.mul_(0.5)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.policy.lm_head.weight.data.mul_(2.0)


@pytest.mark.parametrize(
    "callback",
    [
        partial(EMAWeightAveraging, decay=0.5),
        WeightAveraging,
        Edits,
    ],
    ids=["ema", "mean", "by hand"],
)
def test_the_engine_has_the_trainers_weights_whoever_changed_them(callback, playground):
    """Callbacks swap averaged weights in for a validation, and out again, between two optimizer steps."""
    engine = Recording()
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "max_epochs": 2, "limit_train_batches": 4}
    _, record = fit(
        playground, steps=8, engine=engine, module=module_of(playground, lr=1e-2), callbacks=[callback()], **settings
    )
    assert len(record.steps) == 8 and len(record.validations) == 8
    assert all(engine.is_fresh) and len(engine.is_fresh) > 16
    assert max(record.series("rollout/log_prob_abs_diff_max")) < 1e-4


def test_weights_of_a_checkpoint_are_pushed_also_within_a_stage(playground, tmp_path):
    engine = Recording()
    trainer, _ = fit(playground, steps=1, engine=engine, module=(module := module_of(playground, lr=1e-2)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for path in (None, tmp_path / "one.ckpt"):
        trainer.limit_val_batches = 1
        trainer.validate(module, datamodule=trainer.datamodule, verbose=False, ckpt_path=path)
        module.policy.lm_head.weight.data.neg_()
    assert all(engine.is_fresh)
