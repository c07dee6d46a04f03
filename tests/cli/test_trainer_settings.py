"""Settings and callbacks of Lightning do what they say, or are refused before anything is loaded."""

import inspect
import json

import lightning.pytorch as pl
import pytest
from command_line import overlay, run
from lightning.pytorch import callbacks as lightning_callbacks
from playground_fits import fit
from run_records import quickstart_args

from tealightning import ExportPolicy


@pytest.fixture
def fit_args(playground, tmp_path):
    args = quickstart_args("fit", playground, tmp_path, max_steps=2, limit_val_batches=1)
    return [*args, "--rollout.engine=transformers_engine"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--trainer.precision=16-true", "precision=16-true is not supported: updates of float16 weights"),
        ("--trainer.precision=16", "precision=16-mixed is not supported: clipping would take"),
        ("--trainer.plugins=lightning.pytorch.plugins.HalfPrecision", "precision=16-true is not supported"),
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches=0 trains nothing"),
        ("--trainer.limit_val_batches=0.001", "trainer.limit_val_batches=0.001 of 4 batches is none: at least 0.25"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be at least 1, got 0"),
        ("--trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_algorithm is not supported"),
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches is not supported"),
        ("--model.optimizer=LBFGS", "model.optimizer: LBFGS is not supported: its step() computes the loss again"),
        ("--model.optimizer=SparseAdam", "model.optimizer: SparseAdam is not supported: it cannot make a step"),
        (
            "--model.lr_scheduler=cosine --model.lr_scheduler.warmup_steps=9",
            "warmup_steps=9 is more than the 2 rollout",
        ),
        ("--model.lr_scheduler=torch.optim.lr_scheduler.LRScheduler", "LRScheduler is the base class of schedules"),
        ("--model.lr_scheduler=ReduceLROnPlateau", "monitor"),
        ("--model.lr_scheduler=SequentialLR", "model.lr_scheduler"),
        (
            "--data.val=null --trainer.callbacks+=BestOfNReport",
            "data.val is not set: give it a file or a data set of the hub, or leave out BestOf",
        ),
    ],
)
def test_what_cannot_work_is_refused(fit_args, options, told):
    result = run(*fit_args, *options.split())
    assert result.status == 2 and told in result.err, result.err
    assert "Traceback" not in result.err and "optimizer step" not in result.err


def test_settings_without_effect_are_warned_about(fit_args):
    options = ("--trainer.use_distributed_sampler=false", "--trainer.reload_dataloaders_every_n_epochs=1")
    with pytest.warns(UserWarning) as told:
        assert run(*fit_args, *options, "--trainer.max_steps=0").status == 0
    texts = " ".join(str(warning.message) for warning in told)
    for name in ("use_distributed_sampler=false has no effect", "every_n_epochs has no effect", "nothing is trained"):
        assert name in texts


def test_overfit_batches_trains_on_the_same_prompts(playground):
    _, record = fit(playground, steps=3, overfit_batches=1, limit_val_batches=None)
    first, *others = [step["ids"] for step in record.steps]
    assert others == [first, first]


WITH_ARGUMENTS = {
    "EarlyStopping": {"monitor": "val/best_of_4", "mode": "max"},
    "ModelCheckpoint": {"monitor": "val/best_of_4", "mode": "max"},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "OnExceptionCheckpoint": {"dirpath": "here"},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
}
REFUSED = {"BackboneFinetuning", "BatchSizeFinder", "GradientAccumulationScheduler", "LearningRateFinder"}
REFUSED |= {"ModelPruning", "SpikeDetection", "StochasticWeightAveraging"}
BASES = {
    "BaseFinetuning",
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "ProgressBar",
    "ThroughputMonitor",
    "Timer",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*lightning_callbacks.__all__} - BASES))
def test_each_callback_of_lightning_goes_through_a_run_or_is_refused(fit_args, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    entries = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": WITH_ARGUMENTS.get(name, {})}]
    entries += [{"class_path": f"tealightning.{own}"} for own in ("ExportPolicy", "BestOfNReport")]
    file = overlay(tmp_path, {"trainer": {"callbacks": entries, "enable_checkpointing": True}}, "callbacks.yaml")
    options = ("--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true")
    result = run(*fit_args, "-c", file, *options, "--trainer.val_check_interval=1")
    if name in REFUSED:
        assert result.status == 2 and f"{name} is not supported here" in result.err
    else:
        assert result.status == 0, result.err
        assert json.loads((tmp_path / "policy" / "config.json").read_text())["model_type"]


def test_the_refused_callbacks_are_lightnings():
    assert set(lightning_callbacks.__all__) >= REFUSED
    assert set(inspect.signature(pl.Trainer).parameters) >= {"overfit_batches", "gradient_clip_algorithm"}


def test_a_folder_of_checkpoints_that_cannot_be_made_is_refused_at_the_start(fit_args, tmp_path):
    (tmp_path / "file").write_text("x")
    entry = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": f"{tmp_path}/file/x"},
    }
    file = overlay(tmp_path, {"trainer": {"callbacks": [entry]}}, "callbacks.yaml")
    result = run(*fit_args, "-c", file, "--trainer.enable_checkpointing=true")
    assert result.status == 2 and "trainer.callbacks.dirpath" in result.err and "Not a directory" in result.err


def test_a_broken_generation_config_is_refused_at_the_start(fit_args, playground, tmp_path, monkeypatch):
    """Where the policy is exported: nobody else reads it."""
    monkeypatch.setattr("tealightning.training.policy_module.try_export", _refuse)
    assert ExportPolicy().folder == "policy"
    file = overlay(
        tmp_path, {"trainer": {"callbacks": [{"class_path": "tealightning.ExportPolicy"}]}}, "callbacks.yaml"
    )
    assert "export tried" in run(*fit_args, "-c", file).err
    assert run(*fit_args).status == 0


def _refuse(*_, **__):
    raise ValueError("export tried")
