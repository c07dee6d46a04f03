"""A short training with vLLM: at every step the engine samples from the weights that the trainer has."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of
from tiny_policies import largest_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning import ExportPolicy, RolloutCallback
from tealightning.rollouts import EngineContext, VLLMEngine
from tealightning.types import SamplingConfig

STEPS = 5
SAMPLING = SamplingConfig(max_new_tokens=12)
LR = 5e-3  # a step moves weights far enough for old ones to be told from new ones


@pytest.fixture(scope="module")
def engine():
    engine = VLLMEngine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def run(playground, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    logger = CSVLogger(folder, name="", version="")
    trainer, record = fit(
        playground,
        steps=STEPS,
        engine=engine,
        module=module_of(playground, lr=LR),
        callbacks=[ExportPolicy()],
        logger=logger,
        log_every_n_steps=1,
    )
    return trainer, record, folder


def test_vllm_has_the_trainers_weights_at_every_step(run):
    _, record, folder = run
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/step"]]
    differences = [float(row["rollout/log_prob_abs_diff_max"]) for row in rows]
    assert [float(row["rollout/step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert record.largest_move > LR
    assert all(0 < difference < 1e-3 for difference in differences), differences


def test_vllm_without_weight_sync_is_found_out(playground, engine, monkeypatch):
    """The control of the test above: the same run, whose engine keeps its first weights."""
    monkeypatch.setattr(RolloutCallback, "_sync", lambda self, trainer, module: 0.0)
    _, record = fit(playground, steps=STEPS, engine=engine, module=module_of(playground, lr=LR))
    first, *later = record.series("rollout/log_prob_abs_diff_max")
    assert first < 1e-3  # the engine takes over the weights when it starts
    assert all(difference > 0.02 for difference in later), later


def test_exported_policy_gives_the_trained_log_probs_in_transformers_and_vllm(run, playground, monkeypatch):
    trainer, _, folder = run
    exported = str(folder / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = [tokenizer(text).input_ids for text in ("The value of", "If the class defines")]
    context = EngineContext(
        policy=loaded,
        policy_path=exported,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        max_model_len=64,
        seed=0,
    )
    monkeypatch.setattr(VLLMEngine, "sync_weights", lambda self, weights: None)  # vLLM loads the folder by itself
    fresh = VLLMEngine()
    fresh.start(context)
    grouped = fresh.generate(prompts, num_samples=8, sampling=SAMPLING, seeds=[2**40, 2**50])
    fresh.close()

    untrained = AutoModelForCausalLM.from_pretrained(playground / "policy")
    trained = trainer.lightning_module.policy
    assert largest_difference(trained, prompts, grouped, SAMPLING) < 1e-4
    assert largest_difference(loaded, prompts, grouped, SAMPLING) < 1e-4
    assert largest_difference(untrained, prompts, grouped, SAMPLING) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))


@pytest.mark.slow
def test_vllm_has_the_trainers_weights_after_the_average_was_evaluated(playground, engine):
    """The step after each validation samples from the weights that are trained, not from their average."""
    _, record = fit(
        playground,
        steps=STEPS,
        engine=engine,
        module=module_of(playground, lr=LR),
        callbacks=[EMAWeightAveraging(decay=0.9)],
        limit_val_batches=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    assert len(record.validations) == len(record.steps) == STEPS
    differences = record.series("rollout/log_prob_abs_diff_max")
    assert all(0 < difference < 1e-4 for difference in differences), differences


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_vllm_that_keeps_its_weights_is_refused_in_every_stage(stage, playground, engine, monkeypatch):
    """Before anything is measured; vLLM has loaded the right weights from the policy's folder by itself."""
    scored = []
    monkeypatch.setattr(VLLMEngine, "sync_weights", lambda self, weights: None)
    callback = rollout_of(playground, engine, lambda prompts, completions, metadata: scored.extend(completions))
    trainer = trainer_of(callback, max_steps=1, limit_val_batches=1, limit_test_batches=1)
    with pytest.raises(ValueError, match=r"VLLMEngine and the trainer disagree about .*model_type.*vllm"):
        getattr(trainer, stage)(module_of(playground), datamodule=data_of(playground))
    assert scored == []
