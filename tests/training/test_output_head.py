import pytest
import torch
from module_fixtures import VOCAB, make_rollouts, tiny_llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tealightning.functional.log_probs import token_entropy, token_log_probs
from tealightning.training.scoring import linear_head, score_completions, trim

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
}
ARCHITECTURES = {
    "llama": (tiny_llama, True),
    "qwen2_untied": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)), True),
    "phi_with_a_bias": (lambda: PhiForCausalLM(PhiConfig(**SIZES)), True),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, bos_token_id=0)
        ),
        True,
    ),
    "gemma2_with_a_softcap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)), False),
    "granite_with_a_scale": (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)), False),
    "cohere_with_a_scale": (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)), False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_k": 5}], ids=["plain", "filtered"])
def test_scores_are_those_of_the_models_logits(name, sampling):
    """Also for models that change their logits after the output layer, which is found out, not looked up."""
    build, is_plain = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().eval()
    rollouts = make_rollouts([[2.0, 1.0, 0.0], [1.0, 0.0, 3.0]], sampling=sampling)
    rows = torch.arange(6)
    for _ in range(2):  # the second time it is known
        scores = score_completions(model, rollouts, rows, with_entropy=True)
        assert (linear_head(model) is not None) == is_plain
        input_ids, attention_mask, mask = trim(rollouts, rows)
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids, attention_mask=attention_mask.long(), position_ids=positions).logits
        logits = logits[:, -mask.shape[1] - 1 : -1]
        expected = token_log_probs(logits, input_ids[:, -mask.shape[1] :], **sampling).masked_fill(~mask, 0.0)
        torch.testing.assert_close(scores.log_probs, expected, rtol=1e-5, atol=1e-5)
        entropy = token_entropy(logits, temperature=sampling.get("temperature", 1.0)).masked_fill(~mask, 0.0)
        torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)
        weight = model.get_output_embeddings().weight
        ours, wanted = (torch.autograd.grad(values.sum(), weight)[0] for values in (scores.log_probs, expected))
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_output_layer_is_itself_again_after_scoring_and_after_an_error(monkeypatch):
    model = tiny_llama()
    rollouts = make_rollouts([[1.0, 0.0]])
    before = model(torch.tensor([[1, 2, 3]])).logits
    score_completions(model, rollouts, torch.arange(2))
    monkeypatch.setattr("tealightning.training.scoring.linear_log_probs", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_completions(model, rollouts, torch.arange(2))
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
