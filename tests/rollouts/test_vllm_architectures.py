"""vLLM takes over the weights of every kind of architecture: experts, tied heads, renamed modules, and models for which
it runs transformers' own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of their own, those with experts first: vLLM makes its groups of experts with its first model only.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tiny_architectures import tiny_model
from tiny_policies import PROMPTS, SEEDS, engine_context, largest_difference, perturb_, save_policy
from tealightning.pretrained import load_policy
from tealightning.rollouts import VLLMEngine, policy_weights
from tealightning.training.lora import LoRA, add_adapter
from tealightning.types import SamplingConfig

SAMPLING = SamplingConfig(max_new_tokens=16)


def classes(policy):
    every = {cls for module in policy.modules() for cls in type(module).__mro__}
    return {cls: (cls.__bases__, dict(vars(cls))) for cls in every if cls.__module__.startswith("transformers")}


def difference(engine, policy):
    groups = engine.generate(PROMPTS, num_samples=4, sampling=SAMPLING, seeds=SEEDS)
    return largest_difference(policy, PROMPTS, groups, SAMPLING)


for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    save_policy(Path(folder))
    model = tiny_model(name.removesuffix("+lora"))
    perturb_(model)
    model.save_pretrained(folder)
    context = engine_context(folder)
    policy = context.policy = load_policy(folder)
    if name.endswith("+lora"):
        add_adapter(policy, LoRA(rank=4))
    before = classes(policy)
    engine = VLLMEngine(kv_cache_gib=0.01)
    engine.start(context)
    found = [difference(engine, policy)]
    for _ in range(2):
        perturb_(policy)
        engine.sync_weights(policy_weights(policy))
        found.append(difference(engine, policy))
    policy(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # the trainer's own classes are as they were
    print(json.dumps([name, found, classes(policy) == before]), flush=True)
"""
EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen3_moe+lora"]
OTHERS = ["gpt_neox", "gemma2", "gpt2", "starcoder2", "phi"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_samples_from_the_trainers_weights_after_every_push_and_leaves_its_classes_alone(tmp_path):
    helpers, package = Path(__file__).parents[1] / "helpers", Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{helpers}:{package}"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *EXPERTS, *OTHERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: (differences, kept) for name, differences, kept in map(json.loads, done.stdout.splitlines())}
    assert list(found) == EXPERTS + OTHERS
    for name, (differences, kept) in found.items():
        assert max(differences) < 2e-5, (name, differences)
        assert kept, name
