"""Whole trainings of an adapter: both engines sample from it, runs resume exactly, and the command line knows it."""

import os

import numpy as np
import pytest
import torch
import yaml
from command_line import PROSE, overlay, resolved, run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of
from run_records import quickstart_args
from tiny_policies import largest_difference
from transformers import AutoModelForCausalLM

from tealightning import EvaluationRecord, ExportPolicy, LoRA, PolicyGradientLoss
from tealightning.rollouts import EngineContext, TransformersEngine, VLLMEngine
from tealightning.training.lora import adapter_off
from tealightning.types import SamplingConfig

pytestmark = pytest.mark.slow

ENGINES = [TransformersEngine, VLLMEngine]


def lora_module(playground, **kwargs):
    settings = {"lr": 1e-2, "lora": LoRA(rank=4, alpha=16), "loss": PolicyGradientLoss(kl_coef=0.05)}
    return module_of(playground, **settings | kwargs)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.__name__)
def trained(request, playground, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    engine = request.param()
    torch.manual_seed(0)
    trainer, record = fit(
        playground,
        steps=6,
        engine=engine,
        module=lora_module(playground),
        callbacks=[ExportPolicy()],
        logger=CSVLogger(folder, name="", version=""),
    )
    yield trainer.lightning_module, record, folder / "policy"
    engine.close()


def test_engine_has_the_adapter_of_every_step(trained):
    _, record, _ = trained
    differences = record.series("rollout/log_prob_abs_diff_max")
    assert len(differences) == 6
    assert all(0 < difference < 1e-5 for difference in differences), differences
    assert record.largest_move > 0.01
    kl = record.series("train/kl")
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-3, kl


def test_export_has_the_log_probs_of_the_adapted_policy(trained, playground):
    module, _, folder = trained
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded = AutoModelForCausalLM.from_pretrained(playground / "policy").eval()
    ids = module.tokenizer("The file is closed when the block ends", return_tensors="pt").input_ids
    with torch.no_grad():
        found, expected, before = (model(ids).logits.log_softmax(-1) for model in (exported, module.policy, loaded))
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-2
    assert exported.state_dict().keys() == loaded.state_dict().keys()
    assert [file.name for file in folder.glob("adapter*")] == []


def test_vllm_loads_the_export_by_itself(trained, monkeypatch):
    module, _, folder = trained
    monkeypatch.setattr(VLLMEngine, "sync_weights", lambda self, weights: None)
    engine = VLLMEngine()
    engine.start(
        EngineContext(
            policy=AutoModelForCausalLM.from_pretrained(folder),
            policy_path=str(folder),
            tokenizer=module.tokenizer,
            device=torch.device("cpu"),
            max_model_len=64,
            seed=0,
        )
    )
    prompts = [module.tokenizer(text).input_ids for text in ("The value of", "If the class defines")]
    sampling = SamplingConfig(max_new_tokens=12)
    grouped = engine.generate(prompts, num_samples=8, sampling=sampling, seeds=[2**40, 2**50])
    engine.close()
    assert largest_difference(module.policy, prompts, grouped, sampling) < 1e-5
    with adapter_off(module.policy):
        assert largest_difference(module.policy, prompts, grouped, sampling) > 1e-2


def test_resumed_adapter_run_is_the_unbroken_run(playground, tmp_path):
    def settings():
        torch.manual_seed(7)  # of the adapter's first matrix
        return {"module": lora_module(playground, inner_epochs=2)}

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    unbroken, expected = fit(playground, steps=8, callbacks=[saver], enable_checkpointing=True, **settings())
    torch.manual_seed(8)  # the second process would have another one
    _, resumed = fit(
        playground, steps=8, ckpt_path=str(tmp_path / "step=4.ckpt"), module=lora_module(playground, inner_epochs=2)
    )
    assert [step["tokens"] for step in resumed.steps] == [step["tokens"] for step in expected.steps[2:]]
    for found, wanted in zip(resumed.steps, expected.steps[2:], strict=True):
        assert found["metrics"]["train/kl"] == wanted["metrics"]["train/kl"]
    assert torch.equal(resumed.weights, expected.weights)

    file = tmp_path / "step=4.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    policy = unbroken.lightning_module.policy
    in_adapter = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert sum(value.numel() for value in state.values()) == in_adapter
    frozen_bytes = 4 * sum(parameter.numel() for parameter in policy.parameters() if not parameter.requires_grad)
    assert os.path.getsize(file) < frozen_bytes / 2


def test_recorded_kl_is_to_the_policy_without_its_adapter(playground, tmp_path, monkeypatch):
    """Without a KL penalty too, and in inference mode, where Lightning evaluates."""
    monkeypatch.setattr("tealightning.callbacks.evaluation_record.load_policy", None)  # nothing is loaded
    trainer = trainer_of(
        rollout_of(playground),
        EvaluationRecord(kl_samples=2),
        max_steps=2,
        logger=CSVLogger(tmp_path, name="", version=""),
        num_sanity_val_steps=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    module = lora_module(playground, lr=5e-2, loss=None)
    trainer.fit(module, datamodule=data_of(playground))
    before, after = (np.load(tmp_path / "evaluations" / f"val_00000{step}.npz")["kl"] for step in (0, 2))
    assert np.abs(before).max() < 1e-8 and after.mean() > 1e-2
    assert all(parameter.requires_grad for name, parameter in module.policy.named_parameters() if "lora_" in name)


def test_command_line_trains_exports_and_evaluates_an_adapter(playground, tmp_path):
    settings = {
        "model": {"init_args": {"lora": {"rank": 2, "alpha": 4}}},
        "trainer": {
            "enable_checkpointing": True,
            "callbacks": [
                {"class_path": "tealightning.ExportPolicy"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            ],
        },
    }
    args = [*quickstart_args("fit", playground, tmp_path), "-c", overlay(tmp_path, settings, "lora.yaml")]
    args += ["--rollout.engine=transformers_engine", "--model.lora.rank=4"]
    result = run(*args, "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1")
    assert result.status == 0, result.err
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]["lora"]
    assert saved == {"rank": 4, "alpha": 4.0, "target_modules": "all-linear", "rank_stabilized": False}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.vocab_size
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    (tmp_path / "test").mkdir()
    again = [f"--ckpt_path={checkpoint}", f"--trainer.logger.save_dir={tmp_path / 'test'}"]
    result = run("test", "-c", tmp_path / "config.yaml", *again, "--trainer.limit_test_batches=1")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model.lora.rank=8"], {"rank": 8, "alpha": 32.0, "target_modules": "all-linear"}),
        (["--model.lora.target_modules=[q_proj,v_proj]"], {"rank": 16, "target_modules": ["q_proj", "v_proj"]}),
        (["--model.lora={}"], {"rank": 16}),
    ],
)
def test_command_line_sets_the_adapter(given, expected):
    found = resolved("-c", PROSE, *given)["model"]["init_args"]["lora"]
    assert {name: found[name] for name in expected} == expected
