"""Two ranks, an engine in each: both train in one group, and each samples from its own weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_policies import save_policy

RANK = """
import json, os, sys
sys.path[:0] = {paths}
import torch
import torch.distributed as dist
from tiny_policies import PROMPTS, SEEDS, engine_context, largest_difference, token_ids
from tealightning.rollouts import VLLMEngine, policy_weights
from tealightning.types import SamplingConfig

rank, sampling = int(sys.argv[1]), SamplingConfig(max_new_tokens=8)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
context = engine_context({folder!r})
engine = VLLMEngine()
engine.start(context)
with torch.no_grad():
    context.policy.model.norm.weight.add_(0.1 * rank)
engine.sync_weights(policy_weights(context.policy))
grouped = engine.generate(PROMPTS, num_samples=2, sampling=sampling, seeds=SEEDS)
difference = largest_difference(context.policy, PROMPTS, grouped, sampling)
engine.close()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print(json.dumps([dist.get_rank(), dist.get_world_size(), total.item(), difference, token_ids(grouped)]))
"""


@pytest.mark.slow
def test_vllm_keeps_the_process_group_of_two_ranks(tmp_path):
    folder = save_policy(tmp_path / "policy")
    paths = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]
    code = RANK.format(paths=paths, folder=folder, store=tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        results = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for process, (_, errors) in zip(ranks, results, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in results)
    assert (first[:3], second[:3]) == ([0, 2, 3.0], [1, 2, 3.0])
    assert max(first[3], second[3]) < 5e-6
    assert first[4] != second[4]  # other weights
