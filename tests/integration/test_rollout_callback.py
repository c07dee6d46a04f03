"""What the rollout callback promises about engines and samples, over several stages and trainers."""

import lightning.pytorch as pl
import pytest
import torch
from playground_fits import data_of, module_of, record_of, rollout_of, trainer_of
from tiny_policies import perturb_

from tealightning.rollouts import TransformersEngine


class KeepTokens(pl.Callback):
    """The completions of each validation prompt."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[list[int]]] = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        rollouts = batch.rollouts
        for row, ids in enumerate(rollouts.completion_ids):
            key = batch.ids[row // rollouts.group_size]
            self.tokens.setdefault(key, []).append(ids[: rollouts.completion_lengths[row]].tolist())


def validated(playground, module, rollout=None, **data):
    keep = KeepTokens()
    trainer = trainer_of(rollout or rollout_of(playground), keep, limit_val_batches=1.0)
    trainer.validate(module, datamodule=data_of(playground, **data), verbose=False)
    return keep.tokens


def test_samples_of_a_prompt_do_not_depend_on_its_batch(playground):
    whole = validated(playground, module_of(playground), val_batch_size=16)
    assert validated(playground, module_of(playground), val_batch_size=3) == whole
    assert all(len(samples) == 4 for samples in whole.values())
    assert len({str(samples) for samples in whole.values()}) == len(whole) > 10


def test_evaluations_of_the_same_weights_are_the_same_and_seeds_change_them(playground):
    module = module_of(playground)
    first, again, other = (validated(playground, module, rollout_of(playground, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.keys() == other.keys() and first != other


def test_callback_that_serves_a_second_module_samples_from_it(playground):
    rollout = rollout_of(playground)
    for moved in (False, True):
        module = module_of(playground)
        module.configure_model()
        if moved:
            perturb_(module.policy)
        trainer = trainer_of(rollout, max_steps=1)
        trainer.fit(module, datamodule=data_of(playground))
        assert record_of(trainer).series("rollout/log_prob_abs_diff_max")[0] < 1e-4


def test_engine_starts_again_after_an_error_closed_it(playground):
    def fails(prompts, completions, metadata):
        raise ValueError("no")

    engine = TransformersEngine()
    with pytest.raises(RuntimeError, match="no"):
        validated(playground, module_of(playground), rollout_of(playground, engine, fails))
    assert validated(playground, module_of(playground), rollout_of(playground, engine))


def test_training_leaves_the_global_generator_to_others(playground):
    """Generation draws from generators of its own, so that adding a validation changes nothing else."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    trainer = trainer_of(rollout_of(playground), max_steps=2, limit_val_batches=1, val_check_interval=1)
    module = module_of(playground)
    module.configure_model()
    torch.manual_seed(3)
    trainer.fit(module, datamodule=data_of(playground))
    assert torch.equal(torch.rand(2), expected)
