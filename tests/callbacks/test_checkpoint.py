"""ResumableCheckpoint: whatever it writes, the run that goes on from it is the unbroken run."""

import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from playground_fits import fit, module_of

from tealightning import ResumableCheckpoint
from tealightning.callbacks.checkpoint_files import checkpoints
from tealightning.callbacks.checkpoint_io import SealedCheckpointIO

STEPS = 9
EPOCH = 4  # steps
VALIDATIONS = {
    "none": {},
    "every 3 steps": {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "every 4 steps, the length of an epoch": {
        "limit_val_batches": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    },
    "every epoch": {"limit_val_batches": 1},
    "every second epoch": {"limit_val_batches": 1, "check_val_every_n_epoch": 2},
    "twice an epoch": {"limit_val_batches": 1, "val_check_interval": 0.5},
}


class Diary(Callback):
    """What happened when, in order."""

    def __init__(self):
        self.entries = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.entries.append(("epoch starts", trainer.current_epoch))

    def on_train_epoch_end(self, trainer, pl_module):
        self.entries.append(("epoch ends", trainer.current_epoch))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        draws = (random.random(), float(np.random.rand()), float(torch.rand(())))
        logged_at = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.entries.append(("step", batch_idx, trainer.global_step, logged_at, tuple(batch.ids), draws))

    def on_validation_end(self, trainer, pl_module):
        self.entries.append(("validation", trainer.global_step, float(trainer.callback_metrics["val/best_of_4"])))


def train(playground, folder, *, steps=STEPS, every=1, keep=100, callbacks=(), io=True, **kwargs):
    """A short run of the tiny playground; its diary and record."""
    diary, saver = Diary(), ResumableCheckpoint(every_n_steps=every, keep=keep)
    data = {"train": f"{playground / 'prompts' / 'train.jsonl'}@[:{2 * EPOCH}]", "batch_size": 2}
    trainer, record = fit(
        playground,
        steps=steps,
        callbacks=[*callbacks, diary, saver],
        data=data,
        rollout={"group_size": 2},
        module=kwargs.pop("module", None) or module_of(playground),
        enable_checkpointing=True,
        default_root_dir=folder,
        plugins=[SealedCheckpointIO()] if io else [],
        **kwargs,
    )
    return diary.entries, record, trainer


@pytest.mark.parametrize("validation", VALIDATIONS)
def test_a_run_that_goes_on_from_any_checkpoint_is_the_unbroken_run(validation, playground, tmp_path):
    """At any place of an epoch, before and after validations: the same steps, epochs, evaluations, random numbers."""
    entries, record, _ = train(playground, tmp_path, **VALIDATIONS[validation])
    found = checkpoints(tmp_path / "checkpoints")
    assert len(found) == STEPS
    for path in found[1:]:  # the newest is that of a run that had ended
        step = int(re.search(r"\d+", path.name)[0])
        random.seed(step), np.random.seed(step), torch.manual_seed(step)
        resumed, second, _ = train(playground, tmp_path / str(step), ckpt_path=str(path), **VALIDATIONS[validation])
        (done,) = [i for i, entry in enumerate(entries) if entry[0] == "step" and entry[2] == step]
        expected = entries[done + 1 :]
        if expected[0][0] == "epoch ends" and resumed[0] != expected[0]:
            expected = expected[1:]  # written after that hook
        assert resumed == expected, f"from step {step}"
        assert torch.equal(second.weights, record.weights)
