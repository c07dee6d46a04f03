"""ResumableCheckpoint: whatever it writes, the run that goes on from it is the unbroken run."""

import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from playground_fits import fit, module_of

from tealightning import ResumableCheckpoint
from tealightning.reliability.checkpoint_files import VerifiedCheckpointIO, checkpoints, verify
from tealightning.training.lora import LoRA

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
        plugins=[VerifiedCheckpointIO()] if io else [],
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


def test_settings_below_1_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_steps must be at least 1, got 0"):
        ResumableCheckpoint(every_n_steps=0)
    with pytest.raises(ValueError, match=r"checkpoint\.keep must be at least 1, got 0"):
        ResumableCheckpoint(keep=0)


def test_it_writes_every_n_steps_and_at_the_end_and_keeps_the_newest(playground, tmp_path):
    train(playground, tmp_path, steps=5, every=2, keep=2)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step=000005.ckpt", "step=000004.ckpt"]


def test_beside_a_checkpoint_callback_of_the_user_it_writes_nothing_by_itself(playground, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=1, save_top_k=-1)
    train(playground, tmp_path, steps=3, every=None, callbacks=[own])
    assert checkpoints(tmp_path / "checkpoints") == []
    found = checkpoints(tmp_path / "own")
    assert len(found) == 3 and verify(found[0]).global_step == 3


def test_a_users_checkpoint_resumes_with_the_random_streams_too(playground, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=1, save_top_k=-1)
    entries, *_ = train(playground, tmp_path, steps=4, every=None, callbacks=[own])
    resumed, *_ = train(
        playground,
        tmp_path / "resumed",
        steps=4,
        every=None,
        ckpt_path=str(checkpoints(tmp_path / "own")[2]),
        callbacks=[ModelCheckpoint(tmp_path / "own2")],
    )
    steps = [entry for entry in entries if entry[0] == "step"]
    assert [entry for entry in resumed if entry[0] == "step"] == steps[2:]


class Fails(Callback):
    def __init__(self, at, how=None):
        self.at, self.how = at, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            if self.how is not None:
                self.how(trainer, pl_module)
            raise RuntimeError("meant to fail")


def test_weights_that_are_not_finite_are_not_saved(playground, tmp_path, capsys):
    def spoil(trainer, pl_module):
        next(pl_module.policy.parameters()).data.fill_(float("nan"))

    with pytest.raises(RuntimeError, match="meant to fail"):
        train(playground, tmp_path, steps=4, callbacks=[Fails(3, spoil)])
    assert checkpoints(tmp_path / "checkpoints")[0].name == "step=000002.ckpt"
    told = capsys.readouterr().err
    assert "Nothing was saved: the weights are not finite. The newest checkpoint is" in told
    assert "step=000002.ckpt" in told


def test_a_rescue_that_fails_does_not_hide_the_error(playground, tmp_path, capsys, monkeypatch):
    def refuse(trainer, pl_module):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(trainer.strategy.checkpoint_io, "save_checkpoint", full)

    with pytest.raises(RuntimeError, match="meant to fail"):
        train(playground, tmp_path, steps=4, every=1, callbacks=[Fails(3, refuse)])
    told = capsys.readouterr().err
    assert "The last step could not be saved: OSError: [Errno 28] No space left on device" in told
    assert "step=000002.ckpt" in told


def test_before_the_first_step_there_is_nothing_to_save(playground, tmp_path, capsys):
    class FailsAtOnce(Callback):
        def on_train_batch_start(self, *args):
            raise RuntimeError("meant to fail")

    with pytest.raises(RuntimeError, match="meant to fail"):
        train(playground, tmp_path, callbacks=[FailsAtOnce()])
    assert "no step was completed since the start. There is no checkpoint of this run yet." in capsys.readouterr().err


def test_another_number_of_ranks_starts_random_streams_anew_and_says_so(playground, tmp_path):
    train(playground, tmp_path, steps=2)
    path = checkpoints(tmp_path / "checkpoints")[0]
    state = torch.load(path, weights_only=True)
    state["tealightning_ranks"] *= 2
    VerifiedCheckpointIO().save_checkpoint(state, path)
    with pytest.warns(UserWarning, match="random streams of 2 processes and this run has 1"):
        train(playground, tmp_path / "resumed", steps=3, ckpt_path=str(path))


class FailsInValidation(Callback):
    """Raises in the middle of the `at`-th validation."""

    def __init__(self, at):
        self.left = at

    def on_validation_batch_end(self, trainer, *_):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("meant to fail")


def average():
    return EMAWeightAveraging(decay=0.5)


AVERAGED = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target_modules=["q_proj"])], ids=["all weights", "lora"])
def test_a_run_that_averages_weights_goes_on_exactly(lora, playground, tmp_path):
    """The current weights, the average and how many went into it: steps, evaluations of the average, final weights."""

    def run(folder, **kwargs):
        return train(playground, folder, steps=5, callbacks=[average()], module=module(), **AVERAGED | kwargs)

    def module():
        return module_of(playground, lr=1e-2, lora=lora)

    entries, record, _ = run(tmp_path)
    for path in checkpoints(tmp_path / "checkpoints")[1::2]:
        step = int(re.search(r"\d+", path.name)[0])
        random.seed(step), np.random.seed(step), torch.manual_seed(step)
        resumed, second, _ = run(tmp_path / str(step), ckpt_path=str(path))
        (done,) = [i for i, entry in enumerate(entries) if entry[0] == "step" and entry[2] == step]
        expected = entries[done + 1 :]
        assert resumed in (expected, expected[1:]), f"from step {step}"
        assert torch.equal(second.weights, record.weights)


def test_a_run_that_fails_while_the_average_is_evaluated_saves_the_weights_that_it_trains(playground, tmp_path):
    module = lambda: module_of(playground, lr=1e-2)  # noqa: E731
    _, record, _ = train(playground, tmp_path / "whole", steps=5, callbacks=[average()], module=module(), **AVERAGED)
    with pytest.raises(RuntimeError, match="meant to fail"):
        train(
            playground,
            tmp_path,
            steps=5,
            every=100,
            callbacks=[average(), FailsInValidation(1)],
            module=module(),
            **AVERAGED,
        )
    (path,) = checkpoints(tmp_path / "checkpoints")
    _, resumed, _ = train(
        playground, tmp_path / "on", steps=5, callbacks=[average()], module=module(), ckpt_path=str(path), **AVERAGED
    )
    assert len(resumed.steps) == 2 and torch.equal(resumed.weights, record.weights)


class ChangesForValidation(Callback):
    def on_validation_epoch_start(self, trainer, pl_module):
        pl_module.policy.lm_head.weight.data.mul_(1.5)


def test_weights_that_a_callback_has_changed_for_an_evaluation_are_not_saved(playground, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="meant to fail"):
        train(playground, tmp_path, every=100, callbacks=[ChangesForValidation(), FailsInValidation(1)], **AVERAGED)
    assert "Nothing was saved: a callback has changed the weights for an evaluation" in capsys.readouterr().err
    assert checkpoints(tmp_path / "checkpoints") == []
