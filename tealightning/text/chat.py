"""Encode prompts and answers as token ids, with the tokenizer's chat template or as plain text."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from tealightning.errors import UserError
from tealightning.types import Message, Prompt

ChatTemplate = bool | str
"""`"auto"`: the tokenizer's template if it has one. `True`: it must have. `False`: none. Else a Jinja file."""


class ChatFormatter:
    """Encodes prompts, and prompts with an answer, for one tokenizer.

    With a template a plain-text prompt becomes one user message. The template writes its own special tokens, so the
    tokenizer adds none; without a template the tokenizer adds its usual ones, except for a `bos` that the text
    already starts with.

    Raises:
        ValueError: if `chat_template` is True and the tokenizer has none, or is a path that is no file.
    """

    def __init__(self, tokenizer: Any, chat_template: ChatTemplate = "auto") -> None:
        self.tokenizer = tokenizer
        check_template(chat_template)
        self.template = None
        if isinstance(chat_template, str) and chat_template != "auto":
            self.template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        has_own = bool(getattr(tokenizer, "chat_template", None))
        if chat_template is True and not has_own:
            raise UserError(
                f"chat_template=True, but the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
                "give the path of a Jinja file, or False to use prompts as plain text."
            )
        self.uses_template = self.template is not None or (has_own and chat_template is not False)

    def encode_prompts(self, prompts: Sequence[Prompt], *, system_prompt: str | None = None) -> list[list[int]]:
        """Token ids of each prompt, up to where the answer begins: the template's generation prompt included, and no
        `eos` that the tokenizer would append."""
        if self.uses_template:
            return self._encode([self._render(_as_chat(p, system_prompt), generate=True) for p in prompts])
        if system_prompt is not None:
            raise UserError(
                "system_prompt needs a chat template, and prompts are used as plain text here: put it into the prompts."
            )
        _, appended = self._special_tokens
        return [row[: len(row) - appended] for row in self._encode_plain([self._plain(p) for p in prompts])]

    def encode_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt followed by its answer: an assistant message, or text appended to text."""
        pairs = list(zip(prompts, answers, strict=True))
        if self.uses_template:
            chats = [[*_as_chat(p), Message(role="assistant", content=a)] for p, a in pairs]
            return self._encode([self._render(chat, generate=False) for chat in chats])
        return self._encode_plain([self._plain(p) + a for p, a in pairs])

    def _render(self, chat: list[Message], *, generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template runs code of its own: a TypeError is as much its refusal as a raise
            roles = [message["role"] for message in chat]
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template refuses a chat with the roles {roles}: {reason}") from error

    def _plain(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            f"a prompt is a chat, but the tokenizer of {self.tokenizer.name_or_path!r} has no chat template (or "
            "chat_template=False): give chat_template the path of a Jinja file, or use plain-text prompts."
        )

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        adds_bos, _ = self._special_tokens
        bos = self.tokenizer.bos_token
        return self._encode([t.removeprefix(bos) if adds_bos else t for t in texts], special=True)

    def _encode(self, texts: list[str], *, special: bool = False) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    @cached_property
    def _special_tokens(self) -> tuple[bool, int]:
        """Whether the tokenizer puts a `bos` before a text, and how many tokens after it (some append `eos`)."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        bos = self.tokenizer.bos_token_id
        return bos is not None and bos in full[:start], len(full) - start - len(bare)


def _as_chat(prompt: Prompt, system_prompt: str | None = None) -> list[Message]:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is None or chat[0]["role"] == "system":
        return chat
    return [{"role": "system", "content": system_prompt}, *chat]


def check_template(chat_template: ChatTemplate) -> None:
    """Refuse a `ChatTemplate` that is neither true, false, auto nor the path of a file."""
    if isinstance(chat_template, str) and chat_template != "auto" and not Path(chat_template).expanduser().is_file():
        raise UserError(
            'chat_template must be "auto", true, false or the path of a Jinja file; no file is at '
            f"{Path(chat_template).expanduser().absolute()}."
        )
