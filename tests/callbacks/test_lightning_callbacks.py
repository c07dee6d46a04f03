"""Lightning's own callbacks: each works with the numbers of a plain run, or is refused before anything is loaded."""

import pytest
import torch
from copying_engine import CopyingEngine
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from playground_fits import fit, module_of

from tealightning.callbacks.lightning_callbacks import UNSUPPORTED, check_callbacks
from tealightning.rollouts import TransformersEngine
from tealightning.training.lora import LoRA


def letters(prompts, completions, metadata):
    return [sum(map(ord, text)) % 17 + len(text) for text in completions]


def run(playground, folder, *callbacks, lora=None, engine=CopyingEngine, **kwargs):
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "max_epochs": 2, "default_root_dir": folder}
    return fit(
        playground,
        steps=4,
        engine=engine(),
        reward=letters,
        module=module_of(playground, lr=1e-2, lora=lora),
        callbacks=callbacks,
        data={"train": f"{playground / 'prompts' / 'train.jsonl'}@[:8]"},
        **settings | kwargs,
    )


class FreezesEmbeddings(of_lightning.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.policy.get_input_embeddings())

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.policy.get_input_embeddings(), optimizer, lr=1e-2)


WORKING = {
    "WeightAveraging": of_lightning.WeightAveraging,
    "EMAWeightAveraging": lambda: of_lightning.EMAWeightAveraging(decay=0.5),
    "EarlyStopping": lambda: of_lightning.EarlyStopping("val/best_of_4", mode="max", patience=9),
    "LambdaCallback": lambda: of_lightning.LambdaCallback(on_train_epoch_end=lambda *_: None),
    "Timer": lambda: of_lightning.Timer("00:00:10:00"),
    "DeviceStatsMonitor": of_lightning.DeviceStatsMonitor,
    "LearningRateMonitor": of_lightning.LearningRateMonitor,
    "ThroughputMonitor": lambda: of_lightning.ThroughputMonitor(batch_size_fn=len),
    "ModelCheckpoint": of_lightning.ModelCheckpoint,
    "OnExceptionCheckpoint": lambda: of_lightning.OnExceptionCheckpoint("."),
    "ModelSummary": of_lightning.ModelSummary,
    "RichModelSummary": of_lightning.RichModelSummary,
    "RichProgressBar": of_lightning.RichProgressBar,
    "TQDMProgressBar": of_lightning.TQDMProgressBar,
}
IN_DEFAULT_SUITE = ("EMAWeightAveraging",)


@pytest.fixture(scope="module")
def plain(playground, tmp_path_factory):
    trainer, record = run(playground, tmp_path_factory.mktemp("plain"))
    return trainer.global_step, [step["tokens"] for step in record.steps]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_DEFAULT_SUITE else pytest.mark.slow) for name in WORKING]
)
def test_callback_leaves_the_steps_as_they_are(name, plain, playground, tmp_path):
    needs_logger = {"logger": CSVLogger(tmp_path)} if name.endswith(("Monitor", "Throughput")) else {}
    trainer, record = run(
        playground,
        tmp_path,
        WORKING[name](),
        enable_checkpointing="Checkpoint" in name,
        enable_progress_bar="Bar" in name,
        enable_model_summary="Summary" in name,
        **needs_logger,
    )
    assert (trainer.global_step, [step["tokens"] for step in record.steps]) == plain
    assert max(record.series("rollout/log_prob_abs_diff_max")) < 1e-4


def test_layers_are_frozen_and_unfrozen_by_a_finetuning_callback(playground, tmp_path):
    moved = []

    class Watches(of_lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.before = pl_module.policy.get_input_embeddings().weight.detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            after = pl_module.policy.get_input_embeddings().weight
            moved.append(not torch.equal(after, self.before))

    run(playground, tmp_path, FreezesEmbeddings(), Watches())
    assert moved == [False, False, True, True]  # two steps an epoch


def test_the_average_of_an_adapter_is_evaluated(playground, tmp_path):
    callback = of_lightning.EMAWeightAveraging(decay=0.5)
    lora = LoRA(rank=2, target_modules=["q_proj"])
    _, record = run(playground, tmp_path, callback, lora=lora, engine=TransformersEngine)
    assert len(record.steps) == 4 and max(record.series("rollout/log_prob_abs_diff_max")) < 1e-4


REFUSED = {
    "StochasticWeightAveraging": lambda: of_lightning.StochasticWeightAveraging(swa_lrs=1e-3),
    "ModelPruning": lambda: of_lightning.ModelPruning("l1_unstructured"),
    "BackboneFinetuning": of_lightning.BackboneFinetuning,
    "GradientAccumulationScheduler": lambda: of_lightning.GradientAccumulationScheduler({0: 2}),
    "BatchSizeFinder": of_lightning.BatchSizeFinder,
    "LearningRateFinder": of_lightning.LearningRateFinder,
    "SpikeDetection": SpikeDetection,
}


@pytest.mark.parametrize("name", REFUSED)
def test_callback_is_refused_before_anything_is_loaded(name, playground, tmp_path):
    module = module_of(playground)
    with pytest.raises(ValueError, match=f"trainer.callbacks: {name} is not supported here: "):
        fit(playground, steps=1, module=module, callbacks=[REFUSED[name]()], default_root_dir=tmp_path)
    assert module.policy is None


def test_each_callback_of_lightning_is_known():
    """A new one in Lightning is tried before it is listed here."""
    known = {*WORKING, *REFUSED, "BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "LambdaCallback"}
    known |= {"ProgressBar", "WeightAveraging"}
    assert set(of_lightning.__all__) <= known
    assert {kind.__name__ for kind in UNSUPPORTED} == set(REFUSED)


@pytest.mark.parametrize("callback", [of_lightning.EMAWeightAveraging, FreezesEmbeddings])
def test_callbacks_that_load_the_policy_early_are_refused_where_it_is_sharded(callback):
    with pytest.raises(ValueError, match="has the policy loaded before it can be sharded"):
        check_callbacks([callback()], ModelParallelStrategy())
    check_callbacks([callback()], "ddp")
