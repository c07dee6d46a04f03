"""Tiny random policies of many architectures of transformers, with a tokenizer of bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SPECIALS = ("<bos>", "<eos>", "<pad>")
WINDOW = 8  # of sliding attention: shorter than prompts and completions
# Every configuration takes of these what it knows.
COMMON: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIALS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "sliding_window": WINDOW,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    # state spaces and linear attention
    "state_size": 16,
    "time_step_rank": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
HEADS = {"num_key_value_heads": 2}  # as many as of queries
# What an architecture needs beside `COMMON`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1]},
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 16, "num_attention_heads": 4},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **BOTH},
    "ctrl": {"dff": 96},
    "cwm": BOTH,
    "dbrx": {
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 256,
        "num_key_value_heads": 1,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": HEADS,
    "deepseek_v3": {"head_dim": 16, "topk_method": "noaux_tc", **HEADS},
    "diffllama": HEADS,
    "doge": {},
    "dots1": HEADS,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "exaone4": BOTH,
    "exaone_moe": BOTH,
    "falcon": {"num_kv_heads": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 32, **BOTH},
    "gemma3_text": {"query_pre_attn_scalar": 32, **BOTH},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.95, 0.0],
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 259,
        "hidden_size_per_layer_input": 16,
        "pad_token_id": 2,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 16, **BOTH},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"head_dim": 32},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_oss": BOTH,
    "gptj": {"rotary_dim": 16},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "granitemoeshared": {"logits_scaling": 4.0, "shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": [2, 2]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 64},
    "mamba": {},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "minimax": {"sliding_window": None, **HYBRID},
    "minimax_m2": {"rotary_dim": 16},
    "ministral": BOTH,
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"local_attention": 2 * WINDOW, **BOTH},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {},
    "olmo3": BOTH,
    "olmo_hybrid": HYBRID,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 64},
    "rwkv": {"attention_hidden_size": 64},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": BOTH,
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 2},
    "xlstm": {"num_heads": 2, "num_blocks": 2, "qk_dim_factor": 1.0},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "adapter_rank": 8,
        "num_key_value_heads": 2,
        "attention_head_dim": 64,
        "use_mamba_kernels": False,
    },
}


def config_of(name: str, **settings: Any) -> Any:
    """The configuration of a tiny model of `ARCHITECTURES`."""
    kind = CONFIG_MAPPING[name]
    known = {*kind().to_dict(), *kind.attribute_map}
    chosen = {key: value for key, value in COMMON.items() if key in known} if name != "dbrx" else {"vocab_size": 259}
    return AutoConfig.for_model(name, **chosen | ARCHITECTURES[name] | settings)


def build(name: str, *, seed: int = 0, **settings: Any) -> Any:
    """A random model of `ARCHITECTURES` in eval mode, in float32: every weight is noticeably other than its initial
    value, so that none can be lost unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name, **settings), dtype=torch.float32).eval()
    move(model.parameters(), seed=seed + 1)
    return model


@torch.no_grad()
def move(parameters: Iterable[torch.Tensor], *, seed: int, size: float = 0.03) -> None:
    """Change every weight by a random amount, as some large optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """`SPECIALS`, then the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def save(name: str, folder: Path, *, seed: int = 0) -> str:
    """Save a model of `ARCHITECTURES` with its tokenizer; the folder."""
    build(name, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
