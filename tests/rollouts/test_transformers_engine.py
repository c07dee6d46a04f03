"""What is particular to sampling from the trainer's live policy."""

import pytest
import torch
from tiny_policies import PROMPTS, SEEDS, engine_context, largest_difference, save_policy, token_ids
from tool_scripts import tool

from tealightning.rollouts import TransformersEngine
from tealightning.rollouts.transformers import inverse_cdf, shared_prompts_are_right
from tealightning.types import SamplingConfig

SAMPLING = SamplingConfig(max_new_tokens=24)
tiny = tool("bench/tiny_models.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"), tied=True)


def sample(context, *, sampling=SAMPLING, **kwargs):
    engine = TransformersEngine(**kwargs)
    engine.start(context)
    return engine.generate(PROMPTS, num_samples=8, sampling=sampling, seeds=SEEDS)


def test_inverse_cdf_takes_the_token_in_whose_interval_the_number_falls():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])  # intervals: 1 = [0, .25), 3 = [.25, .75), 4 = [.75, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probs.expand(6, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_inverse_cdf_never_takes_a_token_of_probability_zero_when_the_sum_is_rounded():
    probs = torch.cat([torch.full((3,), 1 / 3), torch.zeros(2)])[None] * (1 - 1e-6)
    assert inverse_cdf(probs, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]


@pytest.mark.parametrize("size", [384, 1000])
def test_inverse_cdf_of_many_tokens_is_that_of_all_their_sums(size):
    random = torch.Generator().manual_seed(0)
    probs = torch.randn(200, size, generator=random).mul(3).softmax(dim=-1)
    uniforms = torch.rand(200, generator=random, dtype=torch.float64)
    cdf = probs.double().cumsum(dim=-1)
    expected = (cdf > uniforms[:, None] * cdf[:, -1:]).int().argmax(dim=-1)
    assert torch.equal(inverse_cdf(probs, uniforms), expected)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_transformers_batch_size_changes_nothing(folder, batch_size):
    context = engine_context(folder)
    sampling = SamplingConfig(max_new_tokens=12, stop=["ab", "e"])
    expected = sample(context, sampling=sampling)
    split = sample(context, sampling=sampling, batch_size=batch_size)
    assert token_ids(split) == token_ids(expected)
    assert [[c.text for c in group] for group in split] == [[c.text for c in group] for group in expected]


def test_transformers_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        TransformersEngine(batch_size=0)


def test_transformers_leaves_modes_config_and_gradients_as_they_were(folder):
    context = engine_context(folder)
    policy = context.policy
    config = policy.generation_config
    policy.train()
    policy.model.layers[1].eval()
    modes = {name: module.training for name, module in policy.named_modules()}
    seen = sample(context)
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert policy.generation_config is config and config.repetition_penalty == 3.0
    assert not any(p.grad is not None for p in policy.parameters())
    policy(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert policy.model.embed_tokens.weight.grad.abs().sum() > 0
    assert largest_difference(policy.eval(), PROMPTS, seen, SAMPLING) < 5e-6


def test_transformers_samples_without_dropout_and_with_gradient_checkpointing(folder):
    context = engine_context(folder)
    expected = token_ids(sample(context))
    for layer in context.policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    context.policy.gradient_checkpointing_enable()
    context.policy.train()
    assert token_ids(sample(context)) == expected


def test_transformers_computes_each_prompt_once(folder):
    """Of eight completions of three prompts, then of one that the batch had no room for: all tokens but the last."""
    context = engine_context(folder)
    prompts, request = [[5, 6, 7, 8, 9, 10], [7, 8], [9]], {"num_samples": 3, "sampling": SAMPLING, "seeds": [0, 9, 18]}
    engine = TransformersEngine(batch_size=8)
    engine.start(context)
    engine._share_prompts = False
    expected = [completion for group in engine.generate(prompts, **request) for completion in group]
    engine.start(context)
    seen: list[tuple[int, ...]] = []
    embedding = context.policy.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda layer, inputs, output: seen.append(tuple(inputs[0].shape)))
    found = [completion for group in engine.generate(prompts, **request) for completion in group]
    hook.remove()
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5)
    assert [shape for shape in seen if shape[1] > 1] == [(3, 5), (1, 5)]


@pytest.mark.parametrize("name", ["mamba", "rwkv", "openai-gpt", "recurrent_gemma"])
def test_transformers_computes_prompts_for_each_completion_where_a_cache_cannot_be_given(name):
    assert not shared_prompts_are_right(tiny.build(name))
    assert shared_prompts_are_right(tiny.build("llama"))
