"""The command line on two ranks of gloo that share the weights (FSDP2), each with a vLLM engine of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_records
import torch
from ranks import free_port
from run_records import flat_weights, quickstart_args
from transformers import AutoModelForCausalLM

FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


def run(playground, out, *more, strategy=FSDP2, **trainer):
    out.mkdir(exist_ok=True)
    callbacks = [
        {"class_path": "tealightning.ExportPolicy"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(out), "every_n_train_steps": 2, "save_top_k": -1},
        },
        {"class_path": "run_records.RunRecord", "init_args": {"folder": str(out)}},
    ]
    trainer = {"devices": 2, "enable_checkpointing": True, "callbacks": callbacks, "strategy": strategy} | trainer
    args = [*quickstart_args("fit", playground, out, **trainer), "--import", str(Path(run_records.__file__)), *more]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    return subprocess.run(
        [sys.executable, "-m", "tealightning", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def records(out):
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.fixture(scope="module")
def sharded(playground, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    result = run(playground, out, max_steps=4)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.mark.slow
def test_sharded_ranks_train_one_policy_on_prompts_of_their_own(sharded):
    first, second = records(sharded)
    assert first["sharded"] and second["sharded"] and first["world_size"] == 2
    assert first["weights"] == second["weights"] and first["largest_move"] > 1e-4
    seen = [ids for rank in (first, second) for step in rank["steps"] for ids in step["ids"]]
    assert len(seen) == len(set(seen)) == 4 * 2 * 4


@pytest.mark.slow
def test_engines_have_the_gathered_weights_at_every_step(sharded):
    for rank in records(sharded):
        assert all(0 < step["metrics"]["rollout/log_prob_abs_diff_max"] < 1e-3 for step in rank["steps"])


@pytest.mark.slow
def test_sharded_training_is_that_of_ranks_with_all_weights(sharded, playground, tmp_path):
    result = run(playground, tmp_path / "ddp", strategy="ddp", max_steps=2)
    assert result.returncode == 0, result.stdout + result.stderr
    for ours, theirs in zip(records(sharded), records(tmp_path / "ddp"), strict=True):
        assert not theirs["sharded"]
        for step, expected in zip(ours["steps"], theirs["steps"], strict=False):
            assert step["tokens"] == expected["tokens"]
            assert step["metrics"]["train/grad_norm"] == pytest.approx(expected["metrics"]["train/grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_sharded_training_resumes_where_it_was_and_exports_what_it_trained(sharded, playground, tmp_path):
    (checkpoint,) = sharded.glob("*step=2.ckpt")
    result = run(playground, tmp_path / "resumed", f"--ckpt_path={checkpoint}", max_steps=4)
    assert result.returncode == 0, result.stdout + result.stderr
    for ours, expected in zip(records(tmp_path / "resumed"), records(sharded), strict=True):
        assert [step["tokens"] for step in ours["steps"]] == [step["tokens"] for step in expected["steps"][2:]]
        assert ours["weights"] == expected["weights"]
    exported = AutoModelForCausalLM.from_pretrained(sharded / "policy")
    assert hash_of(exported) == records(sharded)[0]["weights"]


@pytest.mark.slow
def test_the_engine_that_samples_from_the_trainers_own_policy_is_refused(playground, tmp_path):
    result = run(playground, tmp_path / "refused", "--rollout.engine=TransformersEngine", max_steps=1)
    assert result.returncode != 0
    assert "use --rollout.engine=VLLMEngine" in result.stderr


def hash_of(policy: torch.nn.Module) -> str:
    import hashlib

    return hashlib.sha256(flat_weights(policy).numpy().tobytes()).hexdigest()
