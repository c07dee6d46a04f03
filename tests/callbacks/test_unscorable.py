"""When a run stops because its completions cannot be scored."""

import math

import pytest
import torch
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of

from tealightning.callbacks.rollout_checks import UnscorableError, UnscorableGuard


@pytest.mark.parametrize(("max_share", "unscorable", "stops"), [(0.5, 4, False), (0.5, 5, True), (0.0, 0, False)])
def test_share_above_the_limit_stops_a_training_step(max_share, unscorable, stops):
    guard = UnscorableGuard(max_share)
    guard.check(0, 800, "train", None)  # earlier steps do not count
    if not stops:
        return guard.check(unscorable, 8, "train", None)
    with pytest.raises(
        UnscorableError, match=r"5 of the 8 completions of a training step.*share of 0.5 that rollout.max"
    ):
        guard.check(unscorable, 8, "train", None)


def test_share_of_one_never_stops_and_of_zero_always():
    UnscorableGuard(1.0).check(8, 8, "train", None)
    with pytest.raises(UnscorableError, match="The reward says: the judge is asleep"):
        UnscorableGuard(0.0).check(1, 800, "train", "the judge is asleep")


def test_evaluation_counts_all_its_batches_so_far_and_each_evaluation_anew():
    guard = UnscorableGuard(0.5)
    guard.check(2, 8, "val", None)
    guard.check(2, 2, "val", None)  # a last batch of one prompt
    with pytest.raises(UnscorableError, match=r"8 of the 14 completions of this evaluation \(val\)"):
        guard.check(4, 4, "val", None)
    guard.begin_evaluation()
    guard.check(4, 8, "val", None)


def nothing_scored(prompts, completions, metadata):
    return [None] * len(completions)


def test_all_ranks_decide_by_their_sum(playground):
    """A rank that could score nothing goes on if the other could, and stops with it if it could not."""
    other = torch.zeros(2, dtype=torch.float64)  # unscorable and all completions of the other rank

    class TwoRanks(type(module_of(playground))):
        def over_ranks(self, values, op):
            result = super().over_ranks(values, op)
            if "all completions" in values:
                result["unscorable completions"] += other[0]
                result["all completions"] += other[1]
            return result

    def run():
        module = module_of(playground)
        module.__class__ = TwoRanks
        return fit(playground, steps=1, module=module, reward=nothing_scored)

    other += torch.tensor([0, 32])
    run()
    other += torch.tensor([1, 0])
    with pytest.raises(UnscorableError, match="33 of the 64"):
        run()


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
