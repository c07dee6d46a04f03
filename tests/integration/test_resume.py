"""A run that is stopped and resumed is the run that was never stopped."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from playground_fits import fit, module_of

from tealightning import PolicyGradientLoss

PROMPTS = 20  # 5 steps of 4 in an epoch


def settings(playground):
    return {
        "data": {"train": f"{playground / 'prompts' / 'train.jsonl'}@[:{PROMPTS}]"},
        "module": module_of(
            playground,
            estimator="tea",
            loss=PolicyGradientLoss(kl_coef=0.05),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=8),
        ),
    }


@pytest.fixture(scope="module")
def unbroken(playground):
    return fit(playground, steps=8, **settings(playground))[1]


def checkpoints(folder, **kwargs):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **kwargs)


# In the middle of an epoch, at its end, and in the second one.
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resumed_run_is_the_unbroken_run(stop, unbroken, playground, tmp_path):
    saver = checkpoints(tmp_path, every_n_train_steps=1)
    _, first = fit(playground, steps=stop, callbacks=[saver], enable_checkpointing=True, **settings(playground))
    torch.manual_seed(stop)  # the second process would have other global generators
    _, second = fit(playground, steps=8, ckpt_path=str(tmp_path / f"step={stop}.ckpt"), **settings(playground))
    assert len(second.steps) == 8 - stop
    for step, expected in zip(first.steps + second.steps, unbroken.steps, strict=True):
        assert step["ids"] == expected["ids"]
        assert step["tokens"] == expected["tokens"]
        for key in ("train/policy_loss", "train/kl", "train/lr", "rollout/step"):
            assert step["metrics"][key] == expected["metrics"][key], key
    assert torch.equal(second.weights, unbroken.weights)
    assert not torch.equal(first.weights, unbroken.weights)


def test_checkpoint_of_the_end_of_an_epoch_resumes_in_the_next(unbroken, playground, tmp_path):
    """Lightning writes it after the epoch, when the loader has been asked for its end already."""
    saver = checkpoints(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(playground, steps=8, callbacks=[saver], enable_checkpointing=True, **settings(playground))
    _, second = fit(playground, steps=8, ckpt_path=str(tmp_path / "step=5.ckpt"), **settings(playground))
    assert [step["ids"] for step in second.steps] == [step["ids"] for step in unbroken.steps[5:]]
    assert torch.equal(second.weights, unbroken.weights)


def test_checkpoint_holds_the_policy_and_no_reference(playground, tmp_path):
    saver = checkpoints(tmp_path, every_n_train_steps=1)
    trainer, _ = fit(playground, steps=1, callbacks=[saver], enable_checkpointing=True, **settings(playground))
    assert trainer.lightning_module._reference
    state = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"]
    policy = trainer.lightning_module.policy.state_dict()
    assert state.keys() == {f"policy.{name}" for name in policy}
    assert all(torch.equal(state[f"policy.{name}"], value) for name, value in policy.items())
