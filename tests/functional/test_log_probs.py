import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tealightning.functional.log_probs import filter_logits, token_entropy, token_log_probs


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
