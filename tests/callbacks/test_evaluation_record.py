from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from module_fixtures import make_rollouts, tiny_llama
from playground_fits import data_of, module_of, record_of, rollout_of, trainer_of
from transformers import AutoModelForCausalLM

from tealightning import EvaluationRecord
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.losses import kl_estimate
from tealightning.rewards import FunctionReward
from tealightning.training.scoring import score_completions

KL_SAMPLES = 2


class Seen(pl.Callback):
    """The batches of the last validation and of the last test."""

    def __init__(self):
        self.batches = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches["val"] = batch

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches["test"] = batch


def characters(prompts, completions, metadata):
    return [100 * len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


def two_unscored_of_four(prompts, completions, metadata):
    return [(None, float("inf"), 2.0, 3.0)[i % 4] for i in range(len(completions))]


def load(folder, name):
    with np.load(folder / "evaluations" / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def run(playground, tmp_path_factory):
    """Two steps at a learning rate that moves the policy, evaluated before, between and after; then a test."""
    folder = tmp_path_factory.mktemp("record")
    seen = Seen()
    record = EvaluationRecord(gold=FunctionReward(characters), kl_samples=KL_SAMPLES, diversity_samples=3)
    trainer = trainer_of(
        rollout_of(playground),
        record,
        seen,
        max_steps=2,
        logger=CSVLogger(folder, name="", version=""),
        num_sanity_val_steps=-1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        limit_test_batches=1,
    )
    module, data = module_of(playground, lr=0.02), data_of(playground)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    metrics = [validation["metrics"] for validation in record_of(trainer).validations]
    return SimpleNamespace(folder=folder, module=module, record=record, batches=seen.batches, metrics=metrics)


def test_every_evaluation_has_a_file(run):
    files = sorted(file.name for file in (run.folder / "evaluations").iterdir())
    assert files == ["test_000002.npz", "val_000000.npz", "val_000001.npz", "val_000002.npz"]


def test_metrics_follow_from_the_recorded_rewards(run):
    for step in range(3):
        rewards = torch.from_numpy(load(run.folder, f"val_{step:06d}")["rewards"])
        one, four = best_of_n(rewards, [1, 4]).mean(dim=0).tolist()
        assert run.metrics[step]["val/best_of_1"] == pytest.approx(one, rel=1e-6)
        assert run.metrics[step]["val/best_of_4"] == pytest.approx(four, rel=1e-6)
    assert run.metrics[0]["val/best_of_4"] != run.metrics[2]["val/best_of_4"]


@pytest.mark.parametrize("phase", ["val", "test"])
def test_rows_are_the_prompts_and_columns_their_samples(run, phase):
    batch = run.batches[phase]
    rollouts = batch.rollouts
    arrays = load(run.folder, f"{phase}_000002")
    assert arrays["rewards"].shape == (len(batch), 4)
    assert arrays["keys"].tolist() == batch.keys.tolist()
    assert arrays["rewards"].tolist() == rollouts.rewards.tolist()
    assert arrays["lengths"].flatten().tolist() == rollouts.completion_lengths.tolist()
    assert arrays["truncated"].flatten().tolist() == rollouts.truncated.tolist()


def test_gold_is_the_second_reward_of_the_same_completions(run):
    batch = run.batches["val"]
    expected = [
        [100 * len(prompt) + len(text) for text in batch.rollouts.completions[4 * p : 4 * p + 4]]
        for p, prompt in enumerate(batch.prompts)
    ]
    assert load(run.folder, "val_000002")["gold"].tolist() == expected


def test_kl_is_zero_before_training_and_grows(run):
    before, after = load(run.folder, "val_000000"), load(run.folder, "val_000002")
    np.testing.assert_allclose(before["kl"], 0, atol=1e-6)
    assert (after["kl"] > 1e-3).all()
    tokens = after["lengths"][:, :KL_SAMPLES].mean(axis=1)
    np.testing.assert_allclose(after["kl_per_token"] * tokens, after["kl"], rtol=1e-12)


def sequence_log_probs(model, prompt, completion):
    """[T] of one completion, without batching or padding."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0].double()


def test_kl_is_that_of_policy_and_reference(run, playground):
    rollouts = run.batches["test"].rollouts
    policy = run.module.policy.eval()
    reference = AutoModelForCausalLM.from_pretrained(playground / "policy").eval()
    samples = []
    for row in range(KL_SAMPLES):  # of the first prompt
        prompt = rollouts.prompt_ids[row, -int(rollouts.prompt_lengths[row]) :]
        completion = rollouts.completion_ids[row, : int(rollouts.completion_lengths[row])]
        log_ratio = sequence_log_probs(reference, prompt, completion) - sequence_log_probs(policy, prompt, completion)
        samples.append(float((log_ratio.exp() - 1 - log_ratio).sum()))
    assert load(run.folder, "test_000002")["kl"][0] == pytest.approx(sum(samples) / KL_SAMPLES, rel=1e-3)


def test_diversity_is_of_the_first_samples(run):
    rollouts = run.batches["val"].rollouts
    lengths = rollouts.completion_lengths.tolist()
    tokens = [token for row in range(3) for token in rollouts.completion_ids[row, : lengths[row]].tolist()]
    arrays = load(run.folder, "val_000002")
    assert arrays["distinct_1"][0] == pytest.approx(len(set(tokens)) / len(tokens))
    assert arrays["self_similarity"].shape == arrays["distinct_2"].shape == arrays["kl"].shape


def test_is_behind_until_the_step_is_recorded_also_after_a_restart(run):
    resumed = EvaluationRecord()
    assert resumed.is_behind("val", 2)
    resumed.load_state_dict(run.record.state_dict())
    assert not resumed.is_behind("val", 2) and not resumed.is_behind("test", 2)
    assert resumed.is_behind("val", 3)


def test_sanity_check_leaves_no_record_and_unscored_samples_are_nan(playground, tmp_path):
    record = EvaluationRecord(kl_samples=0)
    trainer = trainer_of(
        rollout_of(playground, reward=two_unscored_of_four),
        record,
        max_steps=1,
        logger=CSVLogger(tmp_path, name="", version=""),
        num_sanity_val_steps=1,
        limit_val_batches=1,
    )
    module, data = module_of(playground), data_of(playground)
    trainer.fit(module, datamodule=data)
    assert not (tmp_path / "evaluations").exists() and record.is_behind("val", 1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert not record.is_behind("val", 1)
    arrays = load(tmp_path, "val_000001")
    assert set(arrays) == {
        "keys", "rewards", "lengths", "truncated", "distinct_1", "distinct_2", "self_similarity",
    }  # fmt: skip
    row = [np.nan, np.nan, 2.0, 3.0]
    np.testing.assert_array_equal(arrays["rewards"], [row] * len(arrays["keys"]))


@pytest.mark.parametrize("arguments", [{"kl_samples": -1}, {"diversity_samples": 1}])
def test_too_few_samples_are_refused(arguments):
    with pytest.raises(ValueError, match="kl_samples must be at least 0 and diversity_samples at least 2"):
        EvaluationRecord(**arguments)


def test_kl_far_from_the_reference_is_the_estimate_that_training_penalises():
    """Both clamp k3's exponential: e^20 - 1 + d where the reference gives a sampled token e^60 times the policy's."""
    rollouts = make_rollouts([[1.0, 2.0]])
    rollouts.rollout_log_probs -= 60.0
    log_probs = score_completions(tiny_llama(), rollouts, torch.arange(2)).log_probs
    padded = torch.nn.functional.pad(log_probs, (0, rollouts.completion_ids.shape[1] - log_probs.shape[1]))
    module = SimpleNamespace(reference=tiny_llama(), frozen_log_probs=lambda *_: padded)
    kl, _ = EvaluationRecord()._kl(module, rollouts)
    log_ratio = (rollouts.rollout_log_probs[:, : log_probs.shape[1]] - log_probs).double()
    expected = (kl_estimate(log_ratio) * rollouts.completion_mask[:, : log_probs.shape[1]]).sum(dim=1)
    torch.testing.assert_close(kl.flatten(), expected, rtol=1e-6, atol=0)
    assert kl.max() < 6 * torch.e**20
