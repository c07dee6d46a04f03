"""A generation request: its checks, what ends a completion, its text, and the seeds of its samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tealightning.errors import UserError
from tealightning.rollouts.base import EngineContext, TokenIds
from tealightning.types import Completion, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True, slots=True)
class EndRule:
    """What ends a completion before `max_new_tokens`, the same in every engine."""

    token_ids: list[int]  # each stays as the last token and is left out of the text
    strings: list[str]  # their tokens stay, the text is cut before them


def check_requests(
    prompt_token_ids: TokenIds, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int], max_model_len: int
) -> None:
    """Refuse, with a ValueError and before any work is done, what an engine cannot serve: no samples, another number of
    seeds than prompts, an empty prompt, or one that leaves less than `max_new_tokens` of `max_model_len`."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if len(seeds) != len(prompt_token_ids):
        raise ValueError(f"seeds must hold one seed per prompt: got {len(seeds)} for {len(prompt_token_ids)} prompts.")
    longest = max(0, max_model_len - sampling.max_new_tokens)
    for index, token_ids in enumerate(prompt_token_ids):
        if len(token_ids) == 0:
            raise UserError(f"prompt {index} has no tokens; a prompt needs at least one.")
        if len(token_ids) > longest:
            raise UserError(
                f"prompt {index} has {len(token_ids)} tokens, more than the {longest} that "
                f"max_model_len={max_model_len} leaves beside sampling.max_new_tokens={sampling.max_new_tokens}. "
                "Shorten the prompt, lower max_new_tokens or raise max_model_len."
            )


def end_rule(context: EngineContext, sampling: SamplingConfig) -> EndRule:
    """Every eos id that the policy's generation config, its config or the tokenizer names, and `sampling.stop`.

    A stop string that is a special token (`<|im_end|>`) ends on that token: special tokens have no text to match.
    """
    tokenizer, policy = context.tokenizer, context.policy
    token_ids: set[int] = set()
    for source in (getattr(policy, "generation_config", None), policy.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        named = [] if eos is None else eos if isinstance(eos, list | tuple) else [eos]
        if not all(isinstance(token, int) for token in named):
            raise UserError(
                f"eos_token_id must be a token id or a list of them, got {eos!r}: mend it in config.json or "
                f"generation_config.json of the policy {context.policy_path!r}."
            )
        token_ids.update(named)
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    token_ids.update(special[stop] for stop in sampling.stop if stop in special)
    return EndRule(token_ids=sorted(token_ids), strings=[stop for stop in sampling.stop if stop not in special])


def vllm_sampling(sampling: SamplingConfig, rule: EndRule, *, num_samples: int, seed: int) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams`, the same in its own process and over HTTP; nothing is left to defaults."""
    return {
        "n": num_samples,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0,  # of the sampled token only
        "ignore_eos": True,  # it ends on `stop_token_ids` alone, which hold every eos id
        "stop_token_ids": rule.token_ids,
        "stop": rule.strings,
        "detokenize": bool(rule.strings),
    }


def vllm_arguments(context: EngineContext, *, dtype: str, on_cpu: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, the same as those of `vllm serve`, that the engines' promises rest on; "auto" is the
    policy's data type."""
    if getattr(context.policy.config, "quantization_config", None):
        raise UserError(
            f"{context.policy_path} holds quantized weights: vLLM would sample from those, and cannot take over the "
            "trainer's. Save the policy without quantization (quantization_config in its config.json), or use "
            "--rollout.engine=TransformersEngine."
        )
    arguments: dict[str, Any] = {
        "tokenizer": context.tokenizer.name_or_path or context.policy_path,
        "dtype": str(context.policy.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        "max_model_len": context.max_model_len,
        "load_format": "safetensors",  # never a pickle
        "generation_config": "vllm",  # not the model folder's defaults
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
        "seed": 0,  # not used: every request has its own
    }
    if on_cpu:
        # A step that ends inside a prompt rewinds the generator of a seeded request, which CPU generators cannot: so
        # prompts are never split. The cache is small, because its default is a share of the machine's memory.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context.max_model_len)}
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
        if getattr(context.policy, "_is_stateful", False):  # to share a prompt's state vLLM would have to split prompts
            arguments["enable_prefix_caching"] = False
    return arguments


def completion_texts(tokenizer: "PreTrainedTokenizerBase", completions: TokenIds, rule: EndRule) -> list[str]:
    """The text of each completion: without special tokens, cut before the first stop string."""
    ends = set(rule.token_ids)
    kept = [list(ids[:-1]) if ids and ids[-1] in ends else list(ids) for ids in completions]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text[: first_match(text, rule.strings)] for text in texts]


def completions_of(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[tuple[list[int], list[float], bool]], rule: EndRule
) -> list[Completion]:
    """Completions from token ids, log-probs and whether they were truncated."""
    texts = completion_texts(tokenizer, [token_ids for token_ids, _, _ in samples], rule)
    return [
        Completion(token_ids=token_ids, log_probs=log_probs, text=text, truncated=truncated)
        for (token_ids, log_probs, truncated), text in zip(samples, texts, strict=True)
    ]


def first_match(text: str, strings: Sequence[str]) -> int | None:
    """Where the earliest of `strings` begins in `text`; None = nowhere."""
    return min((at for s in strings if (at := text.find(s)) >= 0), default=None)


def padded(rows: Sequence[Sequence[float]], value: float, side: str = "right") -> Tensor:
    """[rows, longest] of rows of token ids or log-probs, filled up with `value`."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def prompt_seed(run_seed: int, phase: str, step: int, prompt_id: str) -> int:
    """A seed in [0, 2^62) for the samples of one prompt, from a hash of the arguments: on any rank, in any batch.

    Hashing keeps seeds far apart, which matters: engines give child i of a request the seed `seed + i`, so that
    neighbouring seeds would share all but one of their samples.
    """
    key = "\0".join((str(run_seed), phase, str(step), prompt_id)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2
