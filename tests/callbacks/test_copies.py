"""What averaging callbacks copy, and what a run in spawned processes pickles."""

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from playground_fits import data_of, rollout_of

from tealightning import PolicyGradientLoss, PostTrainingModule, PromptDataModule
from tealightning.callbacks import (
    BestOfNReport,
    Budget,
    Deadlines,
    EvaluationRecord,
    ExportPolicy,
    HealthChecks,
    ResumableCheckpoint,
    SampleTable,
)
from tealightning.estimators import build_estimator, estimator_names
from tealightning.rewards import FunctionReward, HTTPReward, SequenceClassifierReward, WeightedReward
from tealightning.rollouts import TransformersEngine, VLLMEngine, VLLMServerEngine
from tealightning.training.lora import LoRA

COPIES = {"copied": copy.deepcopy, "pickled": lambda value: pickle.loads(pickle.dumps(value))}
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture(params=COPIES.values(), ids=COPIES)
def copied(request):
    return request.param


@pytest.fixture
def function_file(tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "def length(prompts, completions, metadata):\n    return [float(len(text)) for text in completions]\n"
    )
    return f"{tmp_path / 'my_reward.py'}:length"


def module_of(playground, estimator="grpo", **kwargs):
    options = {"target_n": 8} if "tea" in estimator or estimator == "pass_at_n" else {}
    return PostTrainingModule(
        str(playground / "policy"), build_estimator(estimator, **options), optimizer=ADAMW, ns=[1, 4], **kwargs
    )


@pytest.mark.parametrize("name", estimator_names())
def test_modules_of_every_estimator_are_copied(name, copied, playground):
    assert repr(copied(module_of(playground, name)).estimator) == repr(module_of(playground, name).estimator)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LoRA(rank=2, target_modules=["q_proj"])}, {"loss": PolicyGradientLoss(kl_coef=0.1)}],
    ids=["plain", "lora", "reference"],
)
def test_a_module_with_its_models_is_copied(settings, copied, playground):
    module = module_of(playground, **settings)
    module.configure_model()
    module.setup("fit")
    assert module.tokenizer is not None
    twin = copied(module)
    for (name, one), (_, other) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other) and one is not other, name


WRITERS = {
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True, compression="gzip"),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("extension", WRITERS)
def test_data_of_every_format_are_copied_after_their_setup(extension, copied, playground, tmp_path):
    rows = [json.loads(line) for line in (playground / "prompts" / "train.jsonl").read_text().splitlines()[:4]]
    path = tmp_path / f"prompts.{extension}"
    WRITERS[extension](pd.DataFrame([{"prompt": row["prompt"], "id": str(i)} for i, row in enumerate(rows)]), path)
    data = PromptDataModule(train=str(path), batch_size=2, tokenizer=str(playground / "policy"))
    data.setup("fit")
    twin = copied(data)
    first, again = next(iter(data.train_dataloader())), next(iter(twin.train_dataloader()))
    assert (first.ids, first.prompts, first.token_ids) == (again.ids, again.prompts, again.token_ids)


def test_rewards_are_copied_also_after_use(copied, function_file, playground):
    used = ["a", "bc"], ["def", "g"], [{}, {}]
    by_path, in_process = FunctionReward(function_file), FunctionReward(function_file, timeout_seconds=30.0)
    try:
        for reward in (by_path, in_process, WeightedReward({"length": by_path}, {"length": 2.0})):
            reward.setup(torch.device("cpu"))
            expected = reward(*used).total.tolist()
            twin = copied(reward)
            assert twin(*used).total.tolist() == expected
            twin.close()
    finally:
        in_process.close()
    classifier = SequenceClassifierReward(str(playground / "reward_model"))
    for reward in (classifier, HTTPReward("http://127.0.0.1:9/score")):
        copied(reward)
    classifier.setup(torch.device("cpu"))
    assert copied(classifier)(*used).total.tolist() == pytest.approx(classifier(*used).total.tolist())


def test_engines_and_callbacks_are_copied(copied, playground):
    for value in (
        *(TransformersEngine(), VLLMEngine(), VLLMServerEngine()),
        *(HealthChecks(), ResumableCheckpoint(), Deadlines(), BestOfNReport(), ExportPolicy(), SampleTable()),
        *(EvaluationRecord(), Budget(), rollout_of(playground), data_of(playground)),
    ):
        assert type(copied(value)) is type(value)


SPAWNED = """
import functools, sys
import torch
from copying_engine import CopyingEngine
from playground_fits import fit
from test_copies import module_of
from pathlib import Path
from tealightning.callbacks import Budget, EvaluationRecord, HealthChecks, ResumableCheckpoint
from tealightning.rewards import FunctionReward

if __name__ == "__main__":
    playground, function, strategy, folder = sys.argv[1:]
    trainer, _ = fit(
        Path(playground), steps=3, engine=CopyingEngine(), module=module_of(Path(playground)),
        reward=FunctionReward(function), strategy=strategy, devices=2, default_root_dir=folder,
        callbacks=[HealthChecks(), Budget(), EvaluationRecord(), ResumableCheckpoint(every_n_steps=1)],
        limit_val_batches=1, val_check_interval=1, enable_checkpointing=True,
    )
    if trainer.is_global_zero:
        print("best", float(trainer.callback_metrics["val/best_of_4"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_spawned_processes_train_as_those_of_ddp_do(function_file, playground, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    folders = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": ":".join(folders)}

    def best(strategy):
        command = [sys.executable, str(script), str(playground), function_file, strategy, str(tmp_path / strategy)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return [line for line in ran.stdout.splitlines() if line.startswith("best")]

    assert best("ddp_spawn") == best("ddp") != []
