"""A mixture of experts evaluated with vLLM from the command line gives the mean reward that transformers gives."""

import csv
import math
import subprocess
import sys

import pytest
from run_records import quickstart_args
from tiny_architectures import tiny_model
from transformers import AutoTokenizer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_validation_of_a_mixture_of_experts_does_not_depend_on_the_engine(playground, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    tiny_model("qwen3_moe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    found = {}
    for engine in ("VLLMEngine", "TransformersEngine"):
        out = tmp_path / engine
        out.mkdir()
        args = quickstart_args("validate", playground, out, limit_val_batches=4)
        args += [f"--model.policy={tmp_path / 'experts'}", f"--rollout.engine={engine}", "--model.ns=[1,64]"]
        command = [sys.executable, "-m", "tealightning", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (row,) = csv.DictReader((out / "metrics.csv").read_text().splitlines())
        found[engine] = float(row["val/best_of_1"]), float(row["val/reward_std"])
    (vllm, spread), (truth, _) = found.values()
    assert abs(vllm - truth) < 4 * spread * math.sqrt(2 / (16 * 64)), found
