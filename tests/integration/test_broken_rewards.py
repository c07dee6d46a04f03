"""Rewards that cannot score, and rewards that fail, in a real run."""

import math

import pytest
import torch
from playground_fits import data_of, fit, module_of, record_of, rollout_of, trainer_of

from tealightning.rollouts import TransformersEngine

GROUP_SIZE = 8


def letters(completions):
    return [float(completion.count("e")) for completion in completions]


def unscored_first_prompt(prompts, completions, metadata):
    return [math.nan] * GROUP_SIZE + letters(completions[GROUP_SIZE:])


def unscored(prompts, completions, metadata):
    return [None] * len(completions)


def test_group_without_rewards_is_survived_and_counted(playground):
    _, record = fit(playground, steps=2, reward=unscored_first_prompt)
    for step in record.steps:
        assert step["metrics"]["rollout/unscorable_fraction"] == 0.25
        assert step["metrics"]["train/groups_too_small"] == 0.25
        assert math.isfinite(step["metrics"]["rollout/reward_mean"])
        assert step["metrics"]["train/grad_norm"] > 0
    assert torch.isfinite(record.weights).all() and record.largest_move > 1e-4


def test_step_without_any_reward_moves_nothing(playground):
    """Not scored is not scored 0, as it was in TRL #5902."""
    _, record = fit(playground, steps=2, reward=unscored, rollout={"max_unscorable": 1.0})
    for step in record.steps:
        assert step["metrics"]["rollout/unscorable_fraction"] == 1.0
        assert step["metrics"]["train/groups_too_small"] == 1.0
        assert step["metrics"]["train/grad_norm"] == 0.0
    assert record.largest_move == 0.0


def test_validation_counts_prompts_with_rewards_only(playground):
    trainer = trainer_of(
        rollout_of(playground, reward=unscored_first_prompt, group_size=GROUP_SIZE), limit_val_batches=1
    )
    module = module_of(playground, ns=[1, GROUP_SIZE])
    (result,) = trainer.validate(module, datamodule=data_of(playground), verbose=False)
    assert result["val/unscorable_fraction"] == 0.25
    assert result["val/best_of_1_prompts"] == result[f"val/best_of_{GROUP_SIZE}_prompts"] == 3.0
    assert math.isfinite(result["val/best_of_1"])


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_reward_that_raises_ends_the_run_and_closes_the_engine(stage, playground):
    calls = []

    def fails(prompts, completions, metadata):
        calls.append(len(completions))
        return letters(completions) if len(calls) < 2 else 1 / 0

    engine = TransformersEngine()
    rollout = rollout_of(playground, engine, fails)
    trainer = trainer_of(rollout, max_steps=5, limit_val_batches=1.0)
    with pytest.raises(RuntimeError, match=r"reward function 'fails' raised ZeroDivisionError on \d+ completions"):
        getattr(trainer, stage)(module_of(playground), datamodule=data_of(playground, val_batch_size=4))
    assert len(calls) == 2
    assert len(record_of(trainer).steps) == (1 if stage == "fit" else 0)
    with pytest.raises(RuntimeError, match="before start"):
        engine.generate([[5]], num_samples=1, sampling=rollout.sampling, seeds=[1])


@pytest.mark.parametrize(
    ("returned", "message"), [([1.0], r"32 values.*\(1,\)"), (["high"] * 32, "high"), (3.0, "float")]
)
def test_reward_with_the_wrong_number_or_kind_of_values_is_one_clear_error(returned, message, playground):
    with pytest.raises(ValueError, match=message):
        fit(playground, steps=1, reward=lambda prompts, completions, metadata: returned)


def test_group_size_too_small_for_the_estimator_is_refused_before_anything_is_loaded(playground):
    module = module_of(playground)
    with pytest.raises(ValueError, match="group_size"):
        fit(playground, steps=1, module=module, rollout={"group_size": 1})
    assert module.policy is None
