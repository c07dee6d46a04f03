"""Random policies that both engines can serve, and checks of completions against the trainer's own log-probs."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.functional.log_probs import token_log_probs
from tealightning.rollouts import EngineContext
from tealightning.types import Completion, SamplingConfig

EOS, END_OF_TURN = 0, 1
TOKENS = ["<eos>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz .,!"]  # a character each
PROMPTS = [[5, 6, 7], [0, 9, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [31]]  # of several lengths; 0 is eos, and pad
SEEDS = [2**40, 2**50 + 1, 2**55 + 2]
MAX_MODEL_LEN = 128

# Defaults that a model folder may bring, every one of which would change the samples.
BAD_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.2,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5, 6],
    "max_new_tokens": 3,
}


def save_policy(folder: Path, *, tied: bool = True, eos_token_id: int | list[int] = EOS) -> str:
    """A Llama of 32 characters with a tokenizer whose pad is its eos, and `BAD_DEFAULTS` in its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(TOKENS),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
                eos_token_id=EOS,
                bos_token_id=None,
                pad_token_id=EOS,
                initializer_range=0.15,
            )
        )
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(BAD_DEFAULTS | {"eos_token_id": eos_token_id}))
    characters = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<eos>", extra_special_tokens=["<|im_end|>"]
    ).save_pretrained(folder)
    return str(folder)


def engine_context(folder: str, *, max_model_len: int = MAX_MODEL_LEN) -> EngineContext:
    """The policy of `folder`, newly loaded, as the trainer would hand it to an engine."""
    return EngineContext(
        policy=AutoModelForCausalLM.from_pretrained(folder),
        policy_path=folder,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device=torch.device("cpu"),
        max_model_len=max_model_len,
        seed=0,
    )


@torch.no_grad()
def trainer_log_probs(policy, prompt: Sequence[int], completion: Completion, sampling: SamplingConfig) -> torch.Tensor:
    """[T] what the trainer makes of the completion's tokens: one forward pass, no cache, no padding."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    return token_log_probs(
        policy(ids).logits[0, len(prompt) - 1 : -1],
        ids[0, len(prompt) :],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


def largest_difference(policy, prompts, grouped: list[list[Completion]], sampling: SamplingConfig) -> float:
    """The largest absolute difference between the engine's log-probs and the trainer's."""
    return max(
        (trainer_log_probs(policy, prompt, c, sampling) - torch.tensor(c.log_probs)).abs().max().item()
        for prompt, group in zip(prompts, grouped, strict=True)
        for c in group
    )


def perturb_(policy) -> None:
    """Change every trainable weight by more than rounding, like a few optimizer steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def token_ids(grouped: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in grouped]
