"""The command line on two ranks of gloo, each with a vLLM engine of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_records
from ranks import free_port
from run_records import quickstart_args

STEPS = 3
VAL_PROMPTS = 11  # odd: the ranks get different numbers


def run(args, *, timeout=280):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tealightning", *args, "--import", str(Path(run_records.__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def record_args(playground, out, **trainer):
    callbacks = [{"class_path": "run_records.RunRecord", "init_args": {"folder": str(out)}}]
    args = quickstart_args(
        "fit", playground, out, num_sanity_val_steps=-1, limit_val_batches=1.0, callbacks=callbacks, **trainer
    )
    return [*args, f"--data.val={playground / 'prompts' / 'val.jsonl'}@[:{VAL_PROMPTS}]"]


@pytest.fixture(scope="module")
def ranks(playground, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    run(record_args(playground, out, max_steps=STEPS, devices=2, strategy="ddp"))
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.slow
def test_ranks_with_a_vllm_engine_each_train_one_policy(ranks):
    first, second = ranks
    assert first["world_size"] == second["world_size"] == 2
    assert first["weights"] == second["weights"]
    assert first["largest_move"] > 1e-4
    assert len(first["steps"]) == len(second["steps"]) == STEPS


@pytest.mark.slow
def test_ranks_share_the_prompts_of_each_step(ranks):
    seen = [ids for rank in ranks for step in rank["steps"] for ids in step["ids"]]
    assert len(seen) == len(set(seen)) == STEPS * 2 * 4
    tokens = [step["tokens"] for rank in ranks for step in rank["steps"]]
    assert all(mine != other for i, mine in enumerate(tokens) for other in tokens[:i])


@pytest.mark.slow
def test_each_ranks_engine_has_the_weights_of_its_trainer(ranks):
    for rank in ranks:
        for step in rank["steps"]:
            assert 0 < step["metrics"]["rollout/log_prob_abs_diff_max"] < 1e-3


@pytest.mark.slow
def test_metrics_of_ranks_are_those_of_all_prompts(ranks, playground, tmp_path):
    run(record_args(playground, tmp_path, max_steps=1))
    alone = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))["validations"][0]
    validated = [rank["validations"][0] for rank in ranks]
    ids = [prompt_id for validation in validated for prompt_id in validation["ids"]]
    assert len(ids) == VAL_PROMPTS and sorted(ids) == sorted(alone["ids"])
    assert validated[0]["metrics"] == validated[1]["metrics"]
    for key in ("best_of_1", "best_of_1_se", "best_of_4", "best_of_4_se", "reward_mean", "completion_length_mean"):
        assert validated[0]["metrics"][f"val/{key}"] == pytest.approx(alone["metrics"][f"val/{key}"], abs=1e-6), key
    for first, second in zip(*(rank["steps"] for rank in ranks), strict=True):
        seconds = [key for key in first["metrics"] if key.endswith("_seconds") or key == "reward"]
        for key in first["metrics"].keys() - seconds:
            assert first["metrics"][key] == second["metrics"][key], key


@pytest.mark.slow
def test_ranks_train_one_adapter_with_its_reference(playground, tmp_path):
    """Switching the adapter off for the reference changes what requires a gradient, which the ranks have agreed on."""
    lora = ["--model.lora.rank=4", "--model.loss.kl_coef=0.1", "--model.gradient_checkpointing=true"]
    args = record_args(playground, tmp_path, max_steps=STEPS, devices=2, strategy="ddp")
    run([*args, *lora, "--rollout.engine=transformers_engine"])
    first, second = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert first["weights"] == second["weights"]
    assert first["largest_move"] > 1e-4
    assert len(first["steps"]) == STEPS
    for step in first["steps"]:
        assert 0 <= step["metrics"]["rollout/log_prob_abs_diff_max"] < 1e-5
    assert first["steps"][0]["metrics"]["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["steps"][-1]["metrics"]["train/kl"] > 0
