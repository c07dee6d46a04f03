"""What tiny models of each architecture say: engine, padded batch and output layer in chunks against one plain pass."""

import pytest
import torch
from tool_scripts import tool

from tealightning.functional.log_probs import token_log_probs
from tealightning.rollouts import EngineContext, RolloutCollector, TransformersEngine
from tealightning.rollouts.transformers import cache_is_right
from tealightning.training.padding import reads_padding
from tealightning.training.scoring import score_completions
from tealightning.types import PromptBatch, RewardScores, SamplingConfig

tiny = tool("bench/tiny_models.py")
PROMPTS = [[5, 6, 7], list(range(40, 53)), [9]]  # the longest is longer than a window


def rollouts_of(policy):
    """Of `TransformersEngine`."""
    context = EngineContext(
        policy=policy,
        policy_path="",
        tokenizer=tiny.byte_tokenizer(),
        device=torch.device("cpu"),
        max_model_len=64,
        seed=0,
    )
    engine = TransformersEngine()
    engine.start(context)
    collector = RolloutCollector(
        engine=engine,
        reward=lambda prompts, completions, _: RewardScores(total=torch.zeros(len(completions)), components={}),
        sampling=SamplingConfig(max_new_tokens=12),
        pad_token_id=2,
    )
    batch = PromptBatch(ids=["a", "b", "c"], prompts=["a", "b", "c"], token_ids=PROMPTS, metadata=[{}, {}, {}])
    return collector.collect(batch, num_samples=2, seeds=[2**40, 2**41, 2**42], weights_version=0)[0]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*key-value cache")
def test_engine_and_training_say_what_a_pass_of_each_completion_alone_says(name):
    """To rounding, with the gradient of every weight; padding is on the left in the engine and on both sides later."""
    policy = tiny.build(name)
    rollouts = rollouts_of(policy)
    scores = score_completions(policy, rollouts, torch.arange(6))
    alone = torch.zeros_like(scores.log_probs)
    for row in range(6):
        width, length = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -width:], rollouts.completion_ids[row, :length]])[None]
        logits = policy(ids, use_cache=False).logits[0, width - 1 : -1]
        alone[row, :length] = token_log_probs(logits, ids[0, width:])
    assert alone.min() < -3
    # Zamba 2's cache rounds more coarsely.
    torch.testing.assert_close(rollouts.rollout_log_probs, alone, rtol=0, atol=2e-4 if name == "zamba2" else 1e-5)
    torch.testing.assert_close(scores.log_probs, alone, rtol=0, atol=1e-5)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(values.sum(), parameters, allow_unused=True) for values in (scores.log_probs, alone)
    )
    assert [g is None for g in found] == [g is None for g in expected]
    for ours, wanted in ((a, b) for a, b in zip(found, expected, strict=True) if a is not None):
        assert (ours - wanted).norm() <= 1e-3 * wanted.norm() + 1e-4


def test_models_that_read_padding_are_found_out():
    """Mamba masks its state and attention its keys; only what is found is remembered."""
    names = ("rwkv", "xlstm", "recurrent_gemma", "mamba", "jamba", "llama")
    assert [reads_padding(tiny.build(name)) for name in names] == [True, True, True, False, False, False]


def test_caches_that_change_what_a_model_says_are_not_used():
    with torch.no_grad():
        assert not cache_is_right(tiny.build("rwkv"))
        assert not cache_is_right(tiny.build("minimax"))
        assert cache_is_right(tiny.build("llama").bfloat16())
    with pytest.warns(UserWarning, match="MiniMaxForCausalLM .* generated without it"):
        rollouts_of(tiny.build("minimax"))
