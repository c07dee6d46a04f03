import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tealightning.functional.log_probs import linear_log_probs, token_entropy, token_log_probs


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
