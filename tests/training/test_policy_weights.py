"""Weights that are handed out to engines."""

import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from tealightning.pretrained import load_policy
from tealightning.training import policy_weights as module
from tealightning.training.lora import LoRA, add_adapter
from tealightning.training.policy_weights import policy_weights, tied_weight_names, weight_names


def test_weights_of_a_plain_module_are_its_own_not_copies():
    policy = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    policy.append(nn.Linear(3, 3))
    policy[2].weight = policy[1].weight
    weights = dict(policy_weights(policy))
    assert weights.keys() == weight_names(policy) == set(policy.state_dict()) - {"2.weight"}
    assert tied_weight_names(policy) == {"1.weight": ["2.weight"]}
    for name, parameter in policy.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_weights_are_those_that_save_pretrained_writes(name, tmp_path, monkeypatch):
    tiny_model(name).save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)  # knows how it was converted
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    read, most = [], 0
    monkeypatch.setattr(module, "whole", lambda tensor: read.append(tensor) or tensor)
    weights = {}
    for key, tensor in policy_weights(policy):
        most = max(most, len(read))
        read.clear()
        weights[key] = tensor
    assert weights.keys() == saved.keys() == weight_names(policy)
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    layers = Counter(re.match(r".*?\.\d+\.|.*", key)[0] for key in policy.state_dict())
    assert most <= max(layers.values())  # one layer is read at a time
    tied = [other for others in tied_weight_names(policy).values() for other in others]
    assert len(tied) == len(list(policy.named_parameters(remove_duplicate=False))) - len(list(policy.parameters()))


def test_weights_of_adapted_experts_are_merged_one_by_one(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    names, ids = weight_names(policy), torch.arange(2, 30)[None]
    loaded = policy(ids).logits.detach()
    add_adapter(policy, LoRA(rank=4))
    for parameter in (p for p in policy.parameters() if p.requires_grad):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert weight_names(policy) == names
    save_file({n: w.contiguous() for n, w in policy_weights(policy)}, tmp_path / "model.safetensors", {"format": "pt"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(merged(ids).logits, policy(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, loaded, atol=1e-2)


def test_policy_with_capped_attention_scores_computes_them(tmp_path):
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    ids = torch.arange(2, 30)[None]
    assert torch.equal(load_policy(str(tmp_path))(ids).logits, model(ids).logits)
    model.set_attn_implementation("sdpa")  # has no cap
    assert not torch.allclose(load_policy(str(tmp_path))(ids).logits, model(ids).logits, atol=1e-4)
