"""Settings that people combine with a run: precisions, callbacks, loggers, an engine that serves several modules."""

import csv
import math

import pytest
import torch
from command_line import run
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from playground_fits import data_of, fit, module_of, record_of, rollout_of, trainer_of
from run_records import quickstart_args
from tool_scripts import tool
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning import ExportPolicy, LoRA, PostTrainingModule
from tealightning.estimators import build_estimator
from tealightning.rollouts import VLLMEngine

pytestmark = pytest.mark.slow
MISMATCH = "rollout/log_prob_abs_diff_max"
move = tool("bench/tiny_models.py").move


@pytest.mark.parametrize(
    ("precision", "dtype", "mismatch"),
    [
        ("32-true", torch.float32, 1e-5),
        ("64-true", torch.float64, 1e-5),
        ("bf16-mixed", torch.float32, 0.2),
        ("bf16-true", torch.bfloat16, 0.2),
    ],
)
def test_precisions_train_on_what_they_sample(precision, dtype, mismatch, playground):
    trainer, record = fit(playground, steps=3, precision=precision)
    policy = trainer.lightning_module.policy
    assert {p.dtype for p in policy.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in policy.parameters())
    assert record.largest_move > 0
    assert all(0 <= value < mismatch for value in record.series(MISMATCH)), record.series(MISMATCH)


def test_callbacks_take_keys_with_a_slash(playground, tmp_path):
    saver = ModelCheckpoint(
        tmp_path, monitor="val/best_of_4", mode="max", filename="{step}-{val/best_of_4:.2f}", save_top_k=-1
    )
    stopper = EarlyStopping("val/best_of_4", mode="max", patience=10)
    logger = CSVLogger(tmp_path, name="", version="log")
    trainer, _ = fit(
        playground,
        steps=4,
        callbacks=[saver, stopper, LearningRateMonitor("step")],
        logger=logger,
        enable_checkpointing=True,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    best = trainer.callback_metrics["val/best_of_4"].item()
    assert stopper.best_score.item() >= best
    assert len(list(tmp_path.rglob("*.ckpt"))) == 2
    with (tmp_path / "log" / "metrics.csv").open() as file:
        assert {float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]} == {1e-3}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_loggers_that_need_no_network(kind, playground, tmp_path, monkeypatch):
    pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = TensorBoardLogger(tmp_path) if kind == "tensorboard" else WandbLogger(save_dir=tmp_path, offline=True)
    fit(playground, steps=2, logger=logger, log_every_n_steps=1)
    if kind == "wandb":
        assert "rollout/reward_mean" in dict(logger.experiment.summary)
        logger.experiment.finish()
    files = [file for file in tmp_path.rglob("*") if "tfevents" in file.name or file.suffix == ".wandb"]
    assert len(files) == 1


def test_one_vllm_engine_serves_fits_a_test_and_another_module(playground):
    engine = VLLMEngine()
    rollout = rollout_of(playground, engine)
    first = module_of(playground, lr=5e-3)
    records = []
    for steps in (2, 2):
        trainer = trainer_of(rollout, max_steps=steps)
        trainer.fit(first, datamodule=data_of(playground))
        records.append(record_of(trainer))
    trainer = trainer_of(rollout)
    (tested,) = trainer.test(first, datamodule=data_of(playground), verbose=False)
    second = module_of(playground, lr=5e-3, lora=LoRA(rank=4))
    trainer = trainer_of(rollout, max_steps=2)
    trainer.fit(second, datamodule=data_of(playground))
    records.append(record_of(trainer))
    (again,) = trainer_of(rollout).test(first, datamodule=data_of(playground), verbose=False)
    rollout.close()
    for record in records:
        values = record.series(MISMATCH)
        assert len(values) == 2 and max(values) < 1e-4, values
    assert tested == again  # another module's weights were in between
    assert math.isfinite(tested["test/best_of_4"])


def save_adapter(playground, folder, config, *, more_rows=0):
    base = AutoModelForCausalLM.from_pretrained(playground / "policy")
    if more_rows:
        base.resize_token_embeddings(base.config.vocab_size + more_rows)
    adapted = get_peft_model(base, config).eval()
    move([p for p in adapted.parameters() if p.requires_grad], seed=0, size=0.05)
    adapted.save_pretrained(folder)


def test_command_line_takes_an_adapter_folder(playground, tmp_path):
    save_adapter(playground, tmp_path / "adapter", LoraConfig(target_modules="all-linear"))

    def result_in(folder):
        folder.mkdir()
        args = [*quickstart_args("fit", playground, folder), "--rollout.engine=transformers_engine"]
        args += ["--trainer.limit_val_batches=0", "--trainer.max_steps=1", f"--model.policy={tmp_path / 'adapter'}"]
        return run(*args)

    done = result_in(tmp_path / "run")
    assert done.status == 0, done.err
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    save_adapter(playground, tmp_path / "adapter", prompts)
    refused = result_in(tmp_path / "refused")
    assert refused.status != 0
    assert "model.policy" in refused.err and "PROMPT_TUNING, which puts virtual tokens" in refused.err


def test_an_adapter_folder_trains_with_vllm_and_is_exported_whole(playground, tmp_path):
    """Its own tokenizer and an embedding with a row more: vLLM starts from a merged copy."""
    head = LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(playground, tmp_path / "adapter", head, more_rows=1)
    AutoTokenizer.from_pretrained(playground / "policy").save_pretrained(tmp_path / "adapter")
    module = PostTrainingModule(str(tmp_path / "adapter"), build_estimator("grpo"), ns=[1, 4])
    logger = CSVLogger(tmp_path, name="", version="run")
    _, record = fit(playground, steps=2, engine=VLLMEngine(), module=module, callbacks=[ExportPolicy()], logger=logger)
    assert max(record.series(MISMATCH)) < 1e-4
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), module.policy.parameters(), strict=True))
