"""What callbacks and schedules wait for is checked against the keys that a run logs."""

import sys

import pytest
from command_line import overlay, run
from lightning.pytorch.loggers import CSVLogger
from playground_fits import data_of, module_of, rollout_of, trainer_of
from run_records import quickstart_args

from tealightning import Budget, HealthChecks, PolicyGradientLoss
from tealightning.callbacks.logged_keys import is_better_if_larger, training_keys, validation_keys

MOST = {1: "only ties", 8: "and line and shape", 32: "and predictions"}


@pytest.mark.parametrize("most", MOST)
def test_the_keys_are_those_that_a_run_logs(playground, tmp_path, most):
    rollout, callbacks = rollout_of(playground, group_size=2), [Budget(), HealthChecks()]
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = trainer_of(rollout, *callbacks, max_steps=1, logger=logger, log_every_n_steps=1, **settings)
    kl = {"loss": PolicyGradientLoss(kl_coef=0.1, importance_cap=2.0)} if most == 8 else {}
    module = module_of(playground, ns=[1, most] if most > 1 else [1], extrapolate_ns=[64] if most == 32 else [], **kl)
    trainer.fit(module, datamodule=data_of(playground))
    found = set(trainer.callback_metrics)
    assert found == training_keys(module, rollout, callbacks) | validation_keys(module, rollout)


def test_rewards_are_better_if_larger_and_their_errors_are_not():
    larger = ("reward", "rollout/reward_mean", "val/reward_max", "val/best_of_16", "val/best_of_99_extrapolated")
    assert all(is_better_if_larger(key) for key in (*larger, "val/reward_maze_mean"))
    smaller = ("val/best_of_8_se", "val/best_of_8_prompts", "train/kl", "val/reward_std", "val/reward_http_errors")
    assert not any(is_better_if_larger(key) for key in smaller)


@pytest.fixture
def fit_args(playground, tmp_path):
    args = quickstart_args("fit", playground, tmp_path, max_steps=1, limit_val_batches=1)
    return [*args, "--rollout.engine=transformers_engine"]


def callback(name, module="lightning.pytorch.callbacks", **arguments):
    return {"class_path": f"{module}.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        ("EarlyStopping", "val/best_of_9", "EarlyStopping.monitor=val/best_of_9: nothing logs that key. Did you mean"),
        ("EarlyStopping", "val_loss", "Validation logs val/best_of_1,"),
        (
            "ModelCheckpoint",
            "best_of_4",
            "ModelCheckpoint.monitor=best_of_4: nothing logs that key. Did you mean 'val/b",
        ),
        ("EarlyStopping", "train/kl_loss", "Training logs reward, rollout/completion_length_max"),
        ("EarlyStopping", "test/best_of_4", "nothing logs that key"),
    ],
)
def test_a_monitor_that_is_never_logged_is_refused_with_what_is(fit_args, tmp_path, name, key, told):
    file = overlay(tmp_path, {"trainer": {"callbacks": [callback(name, monitor=key)]}}, "callbacks.yaml")
    result = run(*fit_args, "-c", file, "--trainer.enable_checkpointing=true")
    assert result.status == 2 and told in result.err


def test_a_key_of_validation_is_refused_without_validation(fit_args, tmp_path):
    stop = callback("EarlyStopping", monitor="val/best_of_4", mode="max")
    file = overlay(tmp_path, {"trainer": {"callbacks": [stop]}}, "callbacks.yaml")
    result = run(*fit_args, "-c", file, "--trainer.limit_val_batches=0")
    assert result.status == 2 and "this run has no validation, which would log it" in result.err


def test_a_plateau_is_checked_too_by_name_and_by_either_path(fit_args):
    for path in ("", "torch.optim.lr_scheduler.", "lightning.pytorch.cli."):
        option = f"--model.lr_scheduler={path}ReduceLROnPlateau"
        result = run(*fit_args, option, "--model.lr_scheduler.monitor=val/best_of_5")
        assert result.status == 2
        assert (
            "model.lr_scheduler.monitor=val/best_of_5: nothing logs that key. Did you mean 'val/best_of_" in result.err
        )


def test_a_foreign_callback_may_log_the_key(fit_args, tmp_path, monkeypatch):
    (tmp_path / "own_callback.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass Mine(Callback):\n"
        "    def on_train_batch_end(self, trainer, module, *_):\n        module.log('mine', 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = [callback("EarlyStopping", monitor="mine", mode="max"), callback("Mine", "own_callback")]
    file = overlay(tmp_path, {"trainer": {"callbacks": mine}}, "callbacks.yaml")
    with pytest.warns(UserWarning, match="nothing logs that key.*If Mine does, all is well"):
        assert run(*fit_args, "-c", file).status == 0
    sys.modules.pop("own_callback")


def test_a_reward_that_is_watched_for_its_fall_is_warned_about(fit_args, tmp_path):
    file = overlay(
        tmp_path, {"trainer": {"callbacks": [callback("EarlyStopping", monitor="val/best_of_4")]}}, "callbacks.yaml"
    )
    with pytest.warns(UserWarning, match=r"of which more is better, with .*EarlyStopping\.mode=min: set .*mode=max"):
        assert run(*fit_args, "-c", file).status == 0
