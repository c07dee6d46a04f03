import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from playground_fits import fit, module_of

from tealightning import Budget

ROLLOUTS = 36  # a step: 4 prompts, 9 samples each
NAMES = ["rollouts", "generated_tokens", "trained_tokens"]


def settings(playground, *, estimator="direct", **module):
    """`direct` trains on 2 of 9 rollouts: it leaves out the k-th of a tail of 3, and what is below."""
    return {"module": module_of(playground, estimator=estimator, **module), "rollout": {"group_size": 9}}


@pytest.fixture(scope="module")
def unlimited(playground):
    """Three steps without a budget: spent after each step, by name."""
    budget = Budget()
    _, record = fit(playground, steps=3, callbacks=[budget], **settings(playground))
    assert len(record.steps) == 3
    return {name: record.series(f"train/total_{name}") for name in NAMES} | {"record": record, "budget": budget}


def test_counts_are_those_of_the_completions(unlimited):
    record = unlimited["record"]
    generated = [sum(len(tokens) for tokens in step["tokens"]) for step in record.steps]
    assert unlimited["rollouts"] == [ROLLOUTS, 2 * ROLLOUTS, 3 * ROLLOUTS]
    assert unlimited["generated_tokens"] == [generated[0], sum(generated[:2]), sum(generated)]
    assert unlimited["budget"].spent == {name: unlimited[name][-1] for name in NAMES}


def test_rollouts_without_an_advantage_are_not_trained_on(unlimited):
    assert unlimited["trained_tokens"][-1] == sum(unlimited["record"].series("train/trained_tokens"))
    assert 0 < unlimited["trained_tokens"][-1] < unlimited["generated_tokens"][-1] / 2


def test_every_inner_epoch_trains_on_the_tokens_again(playground):
    budget = Budget()
    # Two optimizer steps, one step of rollouts.
    fit(playground, steps=2, callbacks=[budget], **settings(playground, estimator="mean_reward", inner_epochs=2))
    assert budget.spent["rollouts"] == ROLLOUTS
    assert budget.spent["trained_tokens"] == 2 * budget.spent["generated_tokens"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_training_ends_after_the_step_that_reaches_the_budget(name, unlimited, playground):
    budget = Budget(**{name: int(unlimited[name][1])})
    trainer, _ = fit(playground, steps=5, callbacks=[budget], **settings(playground))
    assert trainer.global_step == 2
    assert budget.spent == {other: unlimited[other][1] for other in NAMES}


def test_a_budget_between_two_steps_is_exceeded_by_a_part_of_a_step(playground):
    budget = Budget(rollouts=ROLLOUTS + 1)
    trainer, _ = fit(playground, steps=5, callbacks=[budget], **settings(playground))
    assert trainer.global_step == 2


def test_a_resumed_run_goes_on_counting(playground, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(playground, steps=1, callbacks=[Budget(), saver], enable_checkpointing=True, **settings(playground))
    budget = Budget(rollouts=3 * ROLLOUTS)
    trainer, record = fit(
        playground, steps=5, callbacks=[budget], ckpt_path=str(tmp_path / "step=1.ckpt"), **settings(playground)
    )
    assert (trainer.global_step, len(record.steps)) == (3, 2)
    assert budget.spent["rollouts"] == 3 * ROLLOUTS


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1 or null, got 0"):
        Budget(**{name: 0})
