"""The small shared parts: seeds, weights, and what ends a completion."""

import hashlib
from itertools import pairwise

import pytest
import torch
from tiny_policies import END_OF_TURN, EOS, TOKENS, engine_context, save_policy

from tealightning.errors import UserError
from tealightning.rollouts import policy_weights, prompt_seed
from tealightning.rollouts.generation_request import EndRule, completion_texts, end_rule, first_match, vllm_arguments
from tealightning.training.policy_weights import tied_weight_names
from tealightning.types import SamplingConfig


def test_prompt_seed_is_a_fixed_hash_of_its_arguments():
    digest = hashlib.blake2b(b"7\0train\x003\0p1", digest_size=8).digest()
    assert prompt_seed(7, "train", 3, "p1") == int.from_bytes(digest, "big") >> 2
    assert 0 <= prompt_seed(7, "train", 3, "p1") < 2**62


def test_prompt_seed_differs_in_every_argument_and_no_two_are_close():
    seeds = [
        prompt_seed(run, phase, step, f"p{prompt}")
        for run in range(3)
        for phase in ("train", "val")
        for step in range(10)
        for prompt in range(200)
    ]
    ordered = sorted(seeds)
    # 12,000 seeds: the smallest gap expected of random ones is 2^62 / 12,000^2 = 3e10
    assert min(b - a for a, b in pairwise(ordered)) > 1e7
    assert prompt_seed(1, "train", 23, "4") != prompt_seed(1, "train", 2, "34")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return engine_context(save_policy(tmp_path_factory.mktemp("policy"), tied=True, eos_token_id=[EOS, 9]))


def test_policy_weights_hold_tied_parameters_once_as_a_checkpoint_does(context):
    weights = dict(policy_weights(context.policy))
    assert weights.keys() == dict(context.policy.named_parameters()).keys()
    assert tied_weight_names(context.policy) == {"model.embed_tokens.weight": ["lm_head.weight"]}
    assert not any(weight.requires_grad for weight in weights.values())


def test_policy_weights_of_a_compiled_policy_have_its_plain_names(context):
    assert dict(policy_weights(torch.compile(context.policy))).keys() == dict(policy_weights(context.policy)).keys()


def test_end_rule_joins_every_source_of_eos_and_takes_special_stop_strings_as_ids(context):
    rule = end_rule(context, SamplingConfig(stop=["<|im_end|>", "ab"]))
    assert rule == EndRule(token_ids=[EOS, END_OF_TURN, 9], strings=["ab"])
    assert end_rule(context, SamplingConfig()) == EndRule(token_ids=[EOS, 9], strings=[])


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], 1.5])
def test_an_end_token_that_is_no_id_is_refused(context, monkeypatch, eos):
    monkeypatch.setattr(context.policy.generation_config, "eos_token_id", eos)
    with pytest.raises(UserError, match=r"eos_token_id must be a token id or a list of them, got .*mend it in"):
        end_rule(context, SamplingConfig())


def test_completion_texts_drop_the_end_and_cut_at_the_first_stop_string(context):
    ids = [[TOKENS.index(c) for c in word] for word in ("xyz", "xaby", "z")]
    rule = EndRule(token_ids=[EOS, 9], strings=["yz", "ab", "y"])
    completions = [ids[0], ids[1], [*ids[2], 9], [END_OF_TURN, *ids[2], EOS], [EOS]]
    assert completion_texts(context.tokenizer, completions, rule) == ["x", "x", "z", "z", ""]


def test_first_match_is_the_earliest_of_all_strings():
    assert first_match("xaby", ["y", "b", "ab"]) == 1
    assert first_match("xaby", ["c"]) is None
    assert first_match("xaby", []) is None


def test_vllm_arguments_refuse_a_quantized_policy(context, monkeypatch):
    assert vllm_arguments(context, dtype="auto", on_cpu=True)["dtype"] == "float32"
    monkeypatch.setattr(context.policy.config, "quantization_config", {"quant_method": "mxfp4"}, raising=False)
    with pytest.raises(ValueError, match="holds quantized weights"):
        vllm_arguments(context, dtype="auto", on_cpu=True)
