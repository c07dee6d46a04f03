"""Reward models of several architectures: a score is that of the model alone on its text, whatever is in the batch."""

import pytest
import torch
from tool_scripts import tool
from transformers import AutoConfig, AutoModelForSequenceClassification

from tealightning.rewards import SequenceClassifierReward

tiny = tool("bench/tiny_models.py")
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_labels": 1,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 32}
ARCHITECTURES = {
    "albert": {"embedding_size": 32},
    "bert": {},
    "bloom": {},
    "camembert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 64},
    "ernie": {},
    "falcon": {},
    "gemma2": GROUPED | {"query_pre_attn_scalar": 32},
    "gpt2": {},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 8, "num_key_value_heads": 1},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 0, "sep_token_id": 1},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": GROUPED,
    "roberta": {},
    "roformer": {"embedding_size": 64},
    "squeezebert": {"embedding_size": 64, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "xlm-roberta": {},
}
TEXTS = ["a", "The value of a name", "is looked up in the scope", "xyz"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_score_is_that_of_the_text_alone(name, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES | ARCHITECTURES[name])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tiny.move(model.parameters(), seed=1, size=0.1)
    model.save_pretrained(tmp_path)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reward = SequenceClassifierReward(str(tmp_path))
    reward.check()
    reward.setup(torch.device("cpu"))
    together = reward.score(["", "", "", ""], TEXTS, [{}, {}, {}, {}])
    with torch.no_grad():
        alone = [model(torch.tensor([tokenizer(text).input_ids])).logits.item() for text in TEXTS]
    assert len({round(score, 3) for score in alone}) == 4
    torch.testing.assert_close(together, torch.tensor(alone, dtype=torch.float64), rtol=1e-5, atol=2e-5)
