"""The fused kernel behind `linear_log_probs`. It needs a GPU; a stand-in shows when it is used, and with what."""

import sys
import warnings
from types import ModuleType

import pytest
import torch

from tealightning.functional import log_probs as fused
from tealightning.functional.log_probs import linear_log_probs

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


def layer(dtype=torch.bfloat16, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(40, 16, generator=generator) / 2).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(40, (tokens,), generator=generator), torch.randn(tokens, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_kernel_is_used_and_gives_what_chunks_give(kernel, temperature, with_entropy):
    results = []
    for chunked in (False, True):
        hidden, weight, token_ids, worth = layer()
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
        linear_log_probs(*layer(seed=seed)[:3])
    assert kernel.calls == 1 + 3
    linear_log_probs(*layer()[:3], temperature=0.5)
    assert kernel.calls == 1 + 3 + 2


@pytest.mark.parametrize("fault", ["value", "all tokens count the same"])
def test_wrong_kernel_is_told_and_not_used(kernel, monkeypatch, fault):
    monkeypatch.setattr(Kernel, "fault", fault)
    with pytest.warns(UserWarning, match=r"its kernel is not used"):
        first = linear_log_probs(*layer()[:3])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = linear_log_probs(*layer()[:3])[0]
    assert kernel.calls == 1 and torch.equal(first, second)
    monkeypatch.setattr("tealightning.functional.log_probs._can_fuse", lambda *_: False)
    assert torch.equal(first, linear_log_probs(*layer()[:3])[0])


@pytest.mark.parametrize(
    "other", [{"top_k": 3}, {"top_p": 0.9}, {"bias": torch.zeros(40, dtype=torch.bfloat16)}, {"dtype": torch.float32}]
)
def test_kernel_is_not_used_for_what_it_cannot_do(kernel, other):
    hidden, weight, token_ids, _ = layer(other.pop("dtype", torch.bfloat16))
    linear_log_probs(hidden, weight, token_ids, **other)
    assert kernel.calls == 0


def test_autocast_decides_on_the_dtype(kernel):
    hidden, weight, token_ids, worth = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = linear_log_probs(hidden, weight, token_ids)
    log_probs.backward(worth)
    assert kernel.calls == 2
    assert hidden.grad.dtype == weight.grad.dtype == log_probs.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trial_may_come_in_an_evaluation(kernel, dtype):
    """Which Lightning runs in inference mode, without gradients: the first use can be the one before training."""
    hidden, weight, token_ids, _ = layer(dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        result, _ = linear_log_probs(hidden * 1, weight, token_ids.clone())
    assert kernel.calls == 2 and torch.isfinite(result).all()


def test_no_gpu_no_kernel():
    hidden, *_ = layer()
    assert not fused._can_fuse(hidden, torch.bfloat16)


def test_interface_of_the_installed_kernel_is_the_one_that_is_called(monkeypatch):
    """liger-kernel's own function, whose plain operations on a CPU take the same arguments as its kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops = pytest.importorskip("liger_kernel.ops", reason="the extra `fused` is not installed")
    hidden, weight, token_ids, worth = layer()
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
