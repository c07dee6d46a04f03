"""Checks around rollouts: lengths that the policy can hold, and completions that cannot be scored."""

from collections.abc import Mapping
from typing import Any

from tealightning.data.prompts import PromptSet
from tealightning.errors import UserError
from tealightning.types import SamplingConfig, Split


def padding_id(tokenizer: Any, config: Any) -> int:
    """What fills tensors beyond the lengths: the tokenizer's pad, or 0 if the policy has no embedding for it.
    Masks come from the lengths, so that any id will do."""
    pad, vocabulary = tokenizer.pad_token_id, getattr(config.get_text_config(), "vocab_size", None)
    return pad if pad is not None and (vocabulary is None or pad < vocabulary) else 0


def check_prompts(
    prompt_sets: Mapping[Any, PromptSet], config: Any, tokenizer: Any, sampling: SamplingConfig, length: int
) -> None:
    """Refuse completions that leave no room for prompts in `length` tokens, and name a prompt (of a phase) that is too
    long, or that holds a token which the policy has no embedding for."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    room = length - sampling.max_new_tokens
    if room <= 0:
        raise UserError(
            f"rollout.sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the {length} "
            "tokens that the policy takes, prompt and completion together."
        )
    for phase, prompts in prompt_sets.items():
        position = int(prompts.tokens.argmax())
        token = int(prompts.tokens[position])
        if vocabulary is not None and token >= vocabulary:
            raise UserError(
                f"data.{phase}: {prompts.name_of(prompts.prompt_of_token(position))} holds token {token} "
                f"({tokenizer.convert_ids_to_tokens(token)!r}), and the policy has {vocabulary} embeddings: tokenizer "
                "and policy do not belong together, or its embedding has to be resized (resize_token_embeddings)."
            )
        longest = int(prompts.lengths.argmax())
        if (tokens := int(prompts.lengths[longest])) > room:
            raise UserError(
                f"data.{phase}: {prompts.name_of(longest)} has {tokens} tokens, more than the {room} that are left of "
                f"{length} beside rollout.sampling.max_new_tokens={sampling.max_new_tokens}. Drop such prompts with "
                f"data.max_prompt_tokens={room}, lower max_new_tokens, or raise rollout.max_model_len if the policy "
                "can hold more."
            )


class UnscorableError(RuntimeError):
    """Too large a share of the completions could not be scored."""


class UnscorableGuard:
    """Compares the share of unscorable completions with a limit in [0, 1] (1 = any): in training step by step, in
    evaluation over what it has had so far, since its last batch may be a single prompt. All ranks decide alike."""

    def __init__(self, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise UserError(f"rollout.max_unscorable must be a share in [0, 1], got {max_share}.")
        self.max_share = max_share
        self.begin_evaluation()

    def begin_evaluation(self) -> None:
        self._unscorable = self._total = 0  # completions of the evaluation under way

    def check(self, unscorable: int, total: int, split: Split, problem: str | None) -> None:
        """Count a batch, of all ranks. `problem` is what the reward says about it.

        Raises:
            UnscorableError: on every rank, if the share is above the limit.
        """
        if split != "train":
            self._unscorable, self._total = self._unscorable + unscorable, self._total + total
            unscorable, total = self._unscorable, self._total
        if unscorable > self.max_share * total:
            where = "a training step" if split == "train" else f"this evaluation ({split})"
            raise UnscorableError(
                f"{unscorable} of the {total} completions of {where} could not be scored, more than the share "
                f"of {self.max_share:g} that rollout.max_unscorable allows. "
                f"{'The reward gave no reason' if problem is None else f'The reward says: {problem}'}. Once that is "
                "mended, the run can be resumed from its last checkpoint."
            )
