"""What is particular to vLLM: each way in which it can corrupt a training run in silence."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_policies import PROMPTS, SEEDS, engine_context, largest_difference, perturb_, save_policy, token_ids

from tealightning.rollouts import VLLMEngine, policy_weights
from tealightning.rollouts.vllm import placement
from tealightning.types import SamplingConfig

SAMPLING = SamplingConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"), tied=True)


def started(folder, *, max_model_len=128, **kwargs):
    context = engine_context(folder, max_model_len=max_model_len)
    engine = VLLMEngine(**kwargs)
    engine.start(context)
    return engine, context.policy


def sample(engine, *, prompts=PROMPTS, seeds=SEEDS, num_samples=4, sampling=SAMPLING):
    return engine.generate(prompts, num_samples=num_samples, sampling=sampling, seeds=seeds)


def test_vllm_runs_two_engines_with_weights_of_their_own(folder):
    one, policy = started(folder)
    two, other_policy = started(folder)
    perturb_(other_policy)
    two.sync_weights(policy_weights(other_policy))
    assert largest_difference(policy, PROMPTS, sample(one), SAMPLING) < 5e-6
    assert largest_difference(other_policy, PROMPTS, sample(two), SAMPLING) < 5e-6
    one.close()
    two.close()


def test_vllm_is_reused_after_close_and_after_a_forgotten_close(folder):
    engine, _ = started(folder)
    expected = token_ids(sample(engine))
    world_size, llm = dist.get_world_size(), id(engine._llm)
    engine.close()
    engine, _ = started(folder)
    assert id(engine._llm) == llm
    del engine
    gc.collect()
    assert dist.is_initialized() and dist.get_world_size() == world_size
    engine, _ = started(folder)
    assert id(engine._llm) == llm
    assert token_ids(sample(engine)) == expected
    engine.close()


def test_vllm_start_with_another_length_replaces_its_engine(folder):
    engine, _ = started(folder)
    engine.start(engine_context(folder, max_model_len=160))
    assert len(sample(engine, prompts=[[5] * 130], seeds=[1])[0]) == 4
    engine.close()


def test_vllm_refuses_a_push_that_leaves_a_weight_behind(folder):
    engine, policy = started(folder)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0"):
        engine.sync_weights([(n, w) for n, w in policy_weights(policy) if "layers.0.self_attn.q_proj" not in n])
    perturb_(policy)
    engine.sync_weights(policy_weights(policy))  # and is whole again after the next one
    assert largest_difference(policy, PROMPTS, sample(engine), SAMPLING) < 5e-6
    engine.close()


def test_vllm_forgets_the_prompts_that_it_computed_with_the_old_weights(folder):
    prompts = [[5 + i % 20 for i in range(150)]]  # longer than a block of the prefix cache
    engine, policy = started(folder, max_model_len=192)
    sample(engine, prompts=prompts, seeds=[1])
    perturb_(policy)
    engine.sync_weights(policy_weights(policy))
    assert largest_difference(policy, prompts, sample(engine, prompts=prompts, seeds=[1]), SAMPLING) < 5e-6
    engine.close()


def test_vllm_that_started_in_an_evaluation_takes_over_weights_in_training(folder):
    with torch.inference_mode():  # as Lightning validates and tests
        engine, policy = started(folder, max_num_seqs=9)  # settings of its own, so that it is loaded here
        sample(engine)
    perturb_(policy)
    engine.sync_weights(policy_weights(policy))
    assert largest_difference(policy, PROMPTS, sample(engine), SAMPLING) < 5e-6
    engine.close()


def test_vllm_serves_many_prompts_at_once_and_when_memory_is_short(folder):
    # 10 prompts x 4 samples x 120 tokens are more than one step takes (4,096). The small cache holds 9 blocks of 128
    # tokens: as completions grow into a second block, vLLM drops some of them and computes them again.
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 32, (10, 120), generator=generator).tolist()
    seeds = [1000 * i for i in range(10)]
    engine, _ = started(folder, max_model_len=192)
    small, _ = started(folder, max_model_len=192, kv_cache_gib=6e-4)
    together = token_ids(sample(engine, prompts=prompts, seeds=seeds))
    assert token_ids(sample(engine, prompts=prompts[3:5], seeds=seeds[3:5])) == together[3:5]
    assert token_ids(sample(small, prompts=prompts, seeds=seeds)) == together
    engine.close()
    small.close()


def test_vllm_says_which_setting_gives_it_too_little_memory(folder):
    with pytest.raises(ValueError, match="kv_cache_gib"):
        started(folder, kv_cache_gib=1e-5)
    assert dist.get_world_size() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"extra_args": {"logprobs_mode": "raw_logits"}}, r"extra_args may not hold \['logprobs_mode'\]"),
        ({"kv_cache_gib": 0.0}, "kv_cache_gib must be above 0"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1"),
    ],
)
def test_vllm_refuses_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**kwargs)


def test_vllm_passes_extra_args_on(folder):
    engine, policy = started(folder, extra_args={"block_size": 64}, dtype="bfloat16", max_num_seqs=7)
    config = engine._llm.llm_engine.vllm_config
    assert (config.cache_config.block_size, config.scheduler_config.max_num_seqs) == (64, 7)
    assert config.model_config.dtype == torch.bfloat16
    assert 1e-4 < largest_difference(policy, PROMPTS, sample(engine), SAMPLING) < 0.1
    engine.close()


def test_vllm_that_is_missing_says_how_to_install_it(folder, monkeypatch):
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "tealightning\[vllm\]".*make install.*TransformersEngine'):
        started(folder)


def test_vllm_refuses_to_start_before_the_process_group_of_several_ranks(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="before the process group"):
        started(folder)


def test_vllm_places_each_rank_on_its_own_gpu(monkeypatch):
    assert placement(torch.device("cpu")) == {}
    assert placement(torch.device("cuda", 0)) == {}
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        placement(torch.device("cuda", 1))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert placement(torch.device("cuda", 1)) == {"distributed_executor_backend": "external_launcher"}
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("1", "1")


QUIET = """
import sys
sys.path[:0] = {paths}
from tiny_policies import PROMPTS, SEEDS, engine_context
from transformers.utils import logging
logging.disable_progress_bar()
from tealightning.rollouts import VLLMEngine
from tealightning.types import SamplingConfig
engine = VLLMEngine()
engine.start(engine_context({folder!r}))
engine.generate(PROMPTS, num_samples=2, sampling=SamplingConfig(max_new_tokens=4), seeds=SEEDS)
from torch._dynamo.utils import counters
print(counters["frames"]["total"], "functions compiled")
"""


@pytest.mark.slow
def test_vllm_is_quiet_compiles_nothing_and_lets_the_process_end(folder):
    paths = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]
    result = subprocess.run(
        [sys.executable, "-c", QUIET.format(paths=paths, folder=folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0 functions compiled"]
    noise = [line for line in result.stderr.splitlines() if line and "NUMA binding" not in line]
    assert noise == []
