"""When a run stops because its completions cannot be scored."""

import math
from types import SimpleNamespace

import pytest
import torch
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of

from tealightning.callbacks.rollout_checks import UnscorableError, UnscorableGuard

ALONE = SimpleNamespace(world_size=1)


def rollouts(unscorable, total):
    rewards = torch.tensor([math.nan] * unscorable + [0.0] * (total - unscorable)).reshape(1, total)
    return SimpleNamespace(valid=torch.isfinite(rewards))


@pytest.mark.parametrize(("max_share", "unscorable", "stops"), [(0.5, 4, False), (0.5, 5, True), (0.0, 0, False)])
def test_share_above_the_limit_stops_a_training_step(max_share, unscorable, stops):
    guard = UnscorableGuard(max_share)
    guard.check(ALONE, rollouts(0, 800), "train", None)  # earlier steps do not count
    if not stops:
        return guard.check(ALONE, rollouts(unscorable, 8), "train", None)
    with pytest.raises(
        UnscorableError, match=r"5 of the 8 completions of a training step.*share of 0.5 that rollout.max"
    ):
        guard.check(ALONE, rollouts(unscorable, 8), "train", None)


def test_share_of_one_never_stops_and_of_zero_always():
    UnscorableGuard(1.0).check(ALONE, rollouts(8, 8), "train", None)
    with pytest.raises(UnscorableError, match="The reward says: the judge is asleep"):
        UnscorableGuard(0.0).check(ALONE, rollouts(1, 800), "train", "the judge is asleep")


def test_evaluation_counts_all_its_batches_so_far_and_each_evaluation_anew():
    guard = UnscorableGuard(0.5)
    guard.check(ALONE, rollouts(2, 8), "val", None)
    guard.check(ALONE, rollouts(2, 2), "val", None)  # a last batch of one prompt
    with pytest.raises(UnscorableError, match=r"8 of the 14 completions of this evaluation \(val\)"):
        guard.check(ALONE, rollouts(4, 4), "val", None)
    guard.begin_evaluation()
    guard.check(ALONE, rollouts(4, 8), "val", None)


def test_all_ranks_decide_by_their_sum():
    """A rank that could score nothing goes on if the others could, and stops with them if they could not."""
    other = torch.tensor([0.0, 8.0])
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda counts, reduce_op: counts + other)
    ranks = SimpleNamespace(world_size=2, strategy=strategy)
    guard = UnscorableGuard(0.5)
    guard.check(ranks, rollouts(8, 8), "train", None)
    other += torch.tensor([1.0, 0.0])
    with pytest.raises(UnscorableError, match="9 of the 16"):
        guard.check(ranks, rollouts(8, 8), "train", None)
    with pytest.raises(UnscorableError, match="9 of the 24"):
        UnscorableGuard(0.3).check(ranks, rollouts(8, 16), "train", None)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_what_is_no_share_is_refused(share, playground):
    with pytest.raises(ValueError, match=r"rollout.max_unscorable must be a share in \[0, 1\]"):
        rollout_of(playground, max_unscorable=share)


def mostly_unscored(prompts, completions, metadata):
    return [float(len(c)) if i % 4 == 0 else None for i, c in enumerate(completions)]


def test_run_stops_by_default_where_most_cannot_be_scored_and_not_if_told(playground):
    with pytest.raises(UnscorableError, match="24 of the 32 completions of a training step"):
        fit(playground, steps=2, reward=mostly_unscored)
    _, record = fit(playground, steps=2, reward=mostly_unscored, rollout={"max_unscorable": 0.75})
    assert record.series("rollout/unscorable_fraction") == [0.75, 0.75]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_stops_too(stage, playground):
    trainer = trainer_of(rollout_of(playground, reward=mostly_unscored))
    trainer.limit_val_batches = trainer.limit_test_batches = 1.0
    with pytest.raises(UnscorableError, match=r"completions of this evaluation \((val|test)\)"):
        getattr(trainer, stage)(module_of(playground), datamodule=data_of(playground), verbose=False)
