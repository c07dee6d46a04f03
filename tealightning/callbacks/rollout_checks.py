"""Check prompt and completion lengths against what the policy can hold, before it is loaded."""

from collections.abc import Mapping
from typing import Any

from tealightning.data.prompts import PromptSet
from tealightning.pretrained import positions_of
from tealightning.types import SamplingConfig

MOST_TOKENS = 8192
"""Prompt and completion, where nothing else says how long they get."""


def model_length(config: Any, sampling: SamplingConfig, max_prompt_tokens: int | None) -> int:
    """Tokens of a prompt and its completion that an engine prepares for: what the model holds, at most 8,192, or what
    prompts of that length need."""
    needed = MOST_TOKENS if max_prompt_tokens is None else max_prompt_tokens + sampling.max_new_tokens
    return min(positions_of(config) or MOST_TOKENS, needed)


def padding_id(tokenizer: Any, config: Any) -> int:
    """What fills tensors beyond the lengths: the tokenizer's pad, or 0 if the policy has no embedding for it.
    Masks come from the lengths, so that any id will do."""
    pad, vocabulary = tokenizer.pad_token_id, getattr(config.get_text_config(), "vocab_size", None)
    return pad if pad is not None and (vocabulary is None or pad < vocabulary) else 0


def check_prompts(
    prompt_sets: Mapping[Any, PromptSet], config: Any, tokenizer: Any, sampling: SamplingConfig, length: int
) -> None:
    """Whether every prompt fits the policy.

    Args:
        prompt_sets: phase -> its prompts.
        config: The policy's configuration.
        tokenizer: What encoded the prompts.
        length: Tokens of a prompt and its completion together.

    Raises:
        ValueError: if completions leave no room for prompts, or naming the prompt that is too long, or holds a token
            that the policy has no embedding for.
    """
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if sampling.max_new_tokens >= length:
        raise ValueError(
            f"rollout.sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the {length} "
            "tokens that the policy takes, prompt and completion together."
        )
    for phase, prompts in prompt_sets.items():
        if vocabulary is not None:
            _check_vocabulary(phase, prompts, tokenizer, vocabulary)
        longest = int(prompts.lengths.argmax())
        tokens, room = int(prompts.lengths[longest]), length - sampling.max_new_tokens
        if tokens > room:
            raise ValueError(
                f"data.{phase}: {prompts.name_of(longest)} has {tokens} tokens, more than the {room} that are left of "
                f"{length} beside rollout.sampling.max_new_tokens={sampling.max_new_tokens}. Drop such prompts with "
                f"data.max_prompt_tokens={max(room, 1)}, lower max_new_tokens, or raise rollout.max_model_len if the "
                "policy can hold more."
            )


def _check_vocabulary(phase: Any, prompts: PromptSet, tokenizer: Any, vocabulary: int) -> None:
    position = int(prompts.tokens.argmax())
    token = int(prompts.tokens[position])
    if token >= vocabulary:
        raise ValueError(
            f"data.{phase}: {prompts.name_of(prompts.prompt_of_token(position))} holds token {token} "
            f"({tokenizer.convert_ids_to_tokens(token)!r}), and the policy has {vocabulary} embeddings: tokenizer and "
            "policy do not belong together, or its embedding has to be resized (resize_token_embeddings)."
        )
