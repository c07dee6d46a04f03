"""Log-probs of sampled tokens: filtered, in chunks from hidden states, and fused."""

import sys
import warnings
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tealightning.functional import log_probs as fused
from tealightning.functional.log_probs import filter_logits, linear_log_probs, token_entropy, token_log_probs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([0.1, 0.6, 0.9, 1.0]),
)
def test_token_log_probs_equal_the_samplers_distribution(seed, temperature, top_k, top_p):
    """transformers' own warpers are the independent reference."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(None, logits.clone()).softmax(-1)
    sampled = probabilities.argmax(-1)  # in the kept set whatever the settings
    expected = probabilities.gather(-1, sampled[:, None]).squeeze(-1).log()
    actual = token_log_probs(logits, sampled, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_filter_logits_keeps_the_sampled_token():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    kept = filter_logits(logits, torch.tensor([3]), top_k=2)
    assert kept.isfinite().tolist() == [[True, True, False, True]]


def test_token_log_probs_are_computed_in_float32_from_bfloat16():
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    log_probs = token_log_probs(logits, torch.tensor([1, 2]))
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs, logits.float().log_softmax(-1)[[0, 1], [1, 2]], atol=1e-6)


def test_token_entropy_of_a_uniform_distribution_is_log_v():
    assert token_entropy(torch.zeros(2, 8)).tolist() == pytest.approx([2.0794415] * 2)


def layer(tokens, width, vocabulary, *, seed=0, with_bias=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).requires_grad_() if with_bias else None
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, token_ids, torch.randn(tokens, generator=generator)


def gradients(log_probs, upstream, *parameters):
    return torch.autograd.grad(log_probs, [p for p in parameters if p is not None], upstream)


@given(
    tokens=st.integers(0, 20),
    vocabulary=st.integers(2, 40),
    with_bias=st.booleans(),
    sampling=st.sampled_from([{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7, "temperature": 1.5}]),
    tokens_that_fit=st.floats(0.1, 30),
    seed=st.integers(0, 10_000),
)
def test_linear_log_probs_equal_those_of_the_logits(tokens, vocabulary, with_bias, sampling, tokens_that_fit, seed):
    """In value and gradient, whether probabilities are kept or computed again, and however tokens are cut."""
    hidden, weight, bias, token_ids, upstream = layer(tokens, 5, vocabulary, seed=seed, with_bias=with_bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = token_log_probs(logits, token_ids, **sampling)
    log_probs, entropy = linear_log_probs(
        hidden,
        weight,
        token_ids,
        bias=bias,
        with_entropy=True,
        max_logits_bytes=int(tokens_that_fit * 4 * vocabulary),
        **sampling,
    )
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    temperature = sampling.get("temperature", 1.0)
    torch.testing.assert_close(entropy, token_entropy(logits, temperature=temperature).detach(), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    ours = gradients(log_probs, upstream, hidden, weight, bias)
    for got, wanted in zip(ours, gradients(expected, upstream, hidden, weight, bias), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_linear_log_probs_never_hold_more_logits_than_they_may():
    """In peers the logits of all tokens, [tokens, vocabulary], run out of memory (TRL #3678, NeMo-RL #3124)."""
    tokens, vocabulary, limit = 64, 1000, 4 * 1000 * 8
    hidden, weight, _, token_ids, upstream = layer(tokens, 4, vocabulary)
    with LargestTensor() as ours:
        linear_log_probs(hidden, weight, token_ids, max_logits_bytes=limit)[0].backward(upstream)
    with LargestTensor() as naive:
        token_log_probs(hidden @ weight.T, token_ids).backward(upstream)
    assert naive.elements == tokens * vocabulary
    assert ours.elements <= max(limit // 4, weight.numel())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_linear_log_probs_leave_out_gradients_that_nobody_needs(frozen):
    hidden, weight, _, token_ids, upstream = layer(6, 3, 11)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_log_probs(hidden, weight, token_ids)[0].backward(upstream)
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("limit", [2**20, 100])
def test_linear_log_probs_follow_autocast(limit):
    """The product is rounded to bfloat16 as the model's own output layer would; gradients are the parameters' dtype."""
    hidden, weight, _, token_ids, upstream = layer(8, 16, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = token_log_probs(torch.nn.functional.linear(hidden, weight), token_ids)
        log_probs, _ = linear_log_probs(hidden, weight, token_ids, max_logits_bytes=limit)
    assert torch.equal(log_probs, expected)
    ours, wanted = gradients(log_probs, upstream, hidden, weight), gradients(expected, upstream, hidden, weight)
    for got, other in zip(ours, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, other, rtol=0.05, atol=0.05)


NAME = "LigerFusedLinearScaledCrossEntropyFunction"


class Kernel(torch.autograd.Function):
    """The interface of liger-kernel 0.8.5's, in plain operations; `fault` makes it wrong."""

    fault = None
    calls = 0

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, ignore_index, tiles, return_entropy):
        assert (ignore_index, tiles) == (-100, 1)
        Kernel.calls += 1
        log_probs = ((hidden @ weight.T).float() / temperature).log_softmax(dim=-1)
        ctx.save_for_backward(hidden, weight, target, log_probs)
        ctx.temperature = temperature
        loss = -log_probs.gather(-1, target[:, None]).squeeze(-1)
        if Kernel.fault == "value":
            loss = loss * 1.2
        if not return_entropy:
            return loss
        return loss, -(log_probs.exp() * log_probs).sum(dim=-1).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad, _=None):
        hidden, weight, target, log_probs = ctx.saved_tensors
        by_token = torch.ones_like(grad) if Kernel.fault == "all tokens count the same" else grad
        grad_logits = log_probs.exp()
        grad_logits[torch.arange(len(target)), target] -= 1
        grad_logits *= by_token[:, None] / ctx.temperature
        grads = (grad_logits @ weight.float(), grad_logits.T @ hidden.float())
        return grads[0].to(hidden.dtype), grads[1].to(weight.dtype), None, None, None, None, None


@pytest.fixture
def kernel(monkeypatch):
    """A GPU that the kernel is for, as far as the dispatch can tell."""
    module = ModuleType("liger_kernel.ops")
    setattr(module, NAME, Kernel)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    monkeypatch.setattr(fused, "_right", {})
    monkeypatch.setattr(Kernel, "fault", None)
    monkeypatch.setattr(Kernel, "calls", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    def _can_fuse(hidden, dtype):
        return dtype == torch.bfloat16 and len(hidden) > 0

    monkeypatch.setattr("tealightning.functional.log_probs._can_fuse", _can_fuse)
    return Kernel


def bfloat16_layer(dtype=torch.bfloat16, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(40, 16, generator=generator) / 2).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(40, (tokens,), generator=generator), torch.randn(tokens, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_kernel_is_used_and_gives_what_chunks_give(kernel, temperature, with_entropy):
    results = []
    for chunked in (False, True):
        hidden, weight, token_ids, worth = bfloat16_layer()
        nothing = (
            {"bias": torch.zeros(40, dtype=torch.bfloat16)} if chunked else {}
        )  # which the kernel has no place for
        log_probs, entropy = linear_log_probs(
            hidden, weight, token_ids, temperature=temperature, with_entropy=with_entropy, **nothing
        )
        log_probs.backward(worth)
        assert kernel.calls == 2  # the trial and the call, not those with a bias
        assert (entropy is not None) is with_entropy
        results.append([log_probs, hidden.grad, weight.grad] + ([entropy] if with_entropy else []))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.03, atol=0.03)


def test_one_trial_for_each_shape(kernel):
    for seed in range(3):
        linear_log_probs(*bfloat16_layer(seed=seed)[:3])
    assert kernel.calls == 1 + 3
    linear_log_probs(*bfloat16_layer()[:3], temperature=0.5)
    assert kernel.calls == 1 + 3 + 2


@pytest.mark.parametrize("fault", ["value", "all tokens count the same"])
def test_wrong_kernel_is_told_and_not_used(kernel, monkeypatch, fault):
    monkeypatch.setattr(Kernel, "fault", fault)
    with pytest.warns(UserWarning, match=r"its kernel is not used"):
        first = linear_log_probs(*bfloat16_layer()[:3])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = linear_log_probs(*bfloat16_layer()[:3])[0]
    assert kernel.calls == 1 and torch.equal(first, second)
    monkeypatch.setattr("tealightning.functional.log_probs._can_fuse", lambda *_: False)
    assert torch.equal(first, linear_log_probs(*bfloat16_layer()[:3])[0])


@pytest.mark.parametrize(
    "other", [{"top_k": 3}, {"top_p": 0.9}, {"bias": torch.zeros(40, dtype=torch.bfloat16)}, {"dtype": torch.float32}]
)
def test_kernel_is_not_used_for_what_it_cannot_do(kernel, other):
    hidden, weight, token_ids, _ = bfloat16_layer(other.pop("dtype", torch.bfloat16))
    linear_log_probs(hidden, weight, token_ids, **other)
    assert kernel.calls == 0


def test_autocast_decides_on_the_dtype(kernel):
    hidden, weight, token_ids, worth = bfloat16_layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = linear_log_probs(hidden, weight, token_ids)
    log_probs.backward(worth)
    assert kernel.calls == 2
    assert hidden.grad.dtype == weight.grad.dtype == log_probs.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trial_may_come_in_an_evaluation(kernel, dtype):
    """Which Lightning runs in inference mode, without gradients: the first use can be the one before training."""
    hidden, weight, token_ids, _ = bfloat16_layer(dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        result, _ = linear_log_probs(hidden * 1, weight, token_ids.clone())
    assert kernel.calls == 2 and torch.isfinite(result).all()


def test_no_gpu_no_kernel():
    hidden, *_ = bfloat16_layer()
    assert not fused._can_fuse(hidden, torch.bfloat16)


def test_interface_of_the_installed_kernel_is_the_one_that_is_called(monkeypatch):
    """liger-kernel's own function, whose plain operations on a CPU take the same arguments as its kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops = pytest.importorskip("liger_kernel.ops", reason="the extra `fused` is not installed")
    hidden, weight, token_ids, worth = bfloat16_layer()
    assert hasattr(ops, NAME)
    log_probs, entropy = fused._fused_log_probs(hidden, weight, token_ids, temperature=0.7, with_entropy=True)
    expected, expected_entropy = linear_log_probs(hidden, weight, token_ids, temperature=0.7, with_entropy=True)
    torch.testing.assert_close(log_probs, expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0.02, atol=0.05)
    for a, b in zip(
        torch.autograd.grad(log_probs, [hidden, weight], worth),
        torch.autograd.grad(expected, [hidden, weight], worth),
        strict=True,
    ):
        assert (a.float() - b.float()).norm() < 0.05 * b.float().norm()
