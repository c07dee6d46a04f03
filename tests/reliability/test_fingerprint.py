import copy

import pytest
import torch
from torch import nn

from tealightning.pretrained import load_policy
from tealightning.reliability.fingerprint import changed_weights, fingerprint
from tealightning.training.lora import LoRA, add_adapter
from tealightning.training.policy_weights import policy_weights


def model_of(dtype=torch.float32):
    """Matrices, vectors of ones and zeros, an odd number of elements, experts in one tensor, a matrix of zeros."""
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"embedding": (11, 6), "experts": (3, 4, 6), "odd": (3, 5), "scalar": ()}.items():
        setattr(model, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    model.norm = nn.Parameter(torch.ones(6, dtype=dtype))
    model.bias = nn.Parameter(torch.zeros(7, dtype=dtype))
    model.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
    model.zeros = nn.Parameter(torch.zeros(4, 2, dtype=dtype))
    model.register_buffer("correction", torch.zeros(3))
    return model


def bits(model):
    return {name: value.detach().numpy().tobytes() for name, value in model.double().state_dict().items()}


CHANGES = {
    "one number by one bit": lambda m: m.odd.data.view(torch.uint8)[-1, -1:].bitwise_xor_(1),
    "the sign of one number": lambda m: m.odd.data[1, 2].neg_(),
    "the sign of a zero": lambda m: m.bias.data[3:4].neg_(),
    "all signs": lambda m: m.experts.data.neg_(),
    "the signs of two numbers": lambda m: m.embedding.data[2, 1:5:2].neg_(),
    "the signs of every second column": lambda m: m.embedding.data[:, 1::2].neg_(),
    "two rows swapped": lambda m: m.embedding.data.copy_(m.embedding.data[[1, 0, *range(2, 11)]]),
    "rolled": lambda m: m.experts.data.copy_(m.experts.data.roll(1, -1)),
    "experts swapped": lambda m: m.experts.data.copy_(m.experts.data[[2, 1, 0]]),
    "halved": lambda m: m.norm.data.mul_(0.5),
    "NaN": lambda m: m.norm.data[0].fill_(float("nan")),
    "a new tensor": lambda m: setattr(m.norm, "data", m.norm.data + 1),
    "a loaded state": lambda m: m.load_state_dict(m.state_dict() | {"norm": m.norm.detach() * 2}),
    "a buffer": lambda m: m.correction.add_(1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_of_the_weights_changes_the_fingerprint(change, dtype):
    model = model_of(dtype)
    before, untouched = fingerprint(model), copy.deepcopy(model)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before
    assert fingerprint(untouched) == before


def test_two_tensors_swapped_change_the_fingerprint():
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert fingerprint(nn.Sequential(one, other)) != fingerprint(nn.Sequential(other, one))


def test_what_is_beyond_the_first_chunk_counts():
    model = nn.Linear(1500, 1000, bias=False)
    before = fingerprint(model)
    first, last = model.weight.data[0, 0].clone(), model.weight.data[-1, -1].clone()
    model.weight.data[0, 0], model.weight.data[-1, -1] = last, first
    assert fingerprint(model) != before
    model.weight.data[0, 0], model.weight.data[-1, -1] = first, last
    assert fingerprint(model) == before


def test_steps_of_an_optimizer_are_changes_and_a_learning_rate_of_0_is_none():
    model = nn.Linear(3, 3)
    model(torch.ones(3)).sum().backward()
    before = fingerprint(model)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert fingerprint(model) == before
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_changed_weights_differ_everywhere_and_are_restored_to_the_last_bit(dtype, fails):
    model = model_of(dtype)
    model.odd.data[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    version, before = {name: id(value) for name, value in model.named_parameters()}, bits(copy.deepcopy(model))
    try:
        with changed_weights(model):
            inside = bits(copy.deepcopy(model))
            if fails:
                raise KeyError("in the middle")
    except KeyError:
        assert fails
    changed = {name for name in before if inside[name] != before[name]}
    assert changed == {"embedding", "experts", "odd", "scalar", "norm", "bias", "zeros"}
    assert bits(copy.deepcopy(model)) == before
    assert {name: id(value) for name, value in model.named_parameters()} == version


def test_adapters_are_changed_too_also_where_they_are_zero(playground):
    policy = load_policy(str(playground / "policy"), dtype="float32", trust_remote_code=False)
    add_adapter(policy, LoRA(rank=2, target_modules=["q_proj"]))
    before, digest = {name: value.clone() for name, value in policy_weights(policy)}, fingerprint(policy)
    with changed_weights(policy):
        layer = policy.model.layers[0].self_attn.q_proj
        assert layer.lora_B["default"].weight.abs().min() > 0
        inside = {name: value.clone() for name, value in policy_weights(policy)}
    assert all((inside[name] != before[name]).any() for name in before)
    assert fingerprint(policy) == digest


def test_an_adapter_that_is_merged_is_a_change_and_is_not_pushed_twice(playground):
    policy = load_policy(str(playground / "policy"), dtype="float32", trust_remote_code=False)
    add_adapter(policy, LoRA(rank=2, target_modules=["q_proj"]))
    layer = policy.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(0.1)
    before, digest = dict(policy_weights(policy)), fingerprint(policy)
    name = "model.layers.0.self_attn.q_proj.weight"
    unmerged = before[name].clone()
    layer.merge()
    assert fingerprint(policy) != digest
    torch.testing.assert_close(dict(policy_weights(policy))[name], unmerged)
