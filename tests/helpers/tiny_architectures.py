"""Random models of 1,000 to 300,000 parameters of many architectures, with few things in common but the vocabulary."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1}
_ROUTED |= {"topk_group": 1}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": 64}
_WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 2},
    "cohere": _GROUPED,
    "cohere2": _GROUPED,
    "deepseek_v2": _ROUTED | _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _ROUTED | _LATENT,
    "ernie4_5_moe": _GROUPED
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma2": _GROUPED | {"query_pre_attn_scalar": 32},
    "gemma3_text": _GROUPED | _WINDOWS | {"query_pre_attn_scalar": 32},
    "glm4_moe": _GROUPED | _ROUTED,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {},
    "gpt_oss": _GROUPED | _EXPERTS | _WINDOWS,
    "gptj": _GPT | {"rotary_dim": 8},
    "granitemoe": _GROUPED | _EXPERTS,
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1},
    "llama": _GROUPED,
    "mamba": {},
    "minimax": _GROUPED | _EXPERTS,
    "mixtral": _GROUPED | _EXPERTS,
    "mpt": {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 256},
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "phi": {},
    "phimoe": _GROUPED | _EXPERTS,
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3": _GROUPED,
    "qwen3_moe": _GROUPED | _EXPERTS,
    "stablelm": {},
    "starcoder2": _GROUPED,
}


def tiny_model(name: str, **settings: Any) -> Any:
    """A model of an architecture of `ARCHITECTURES`, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(_COMMON | ARCHITECTURES[name] | settings))
        return AutoModelForCausalLM.from_config(config).eval()
