"""Encode prompts and answers as token ids, with the tokenizer's chat template or as plain text."""

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from tealightning.errors import UserError
from tealightning.text.control_tokens import Text, TextEncoder, split_at, strings_in
from tealightning.text.template import Turns, names_in, probe_turns, turn_tokens
from tealightning.types import Message, Prompt

ChatTemplate = bool | str
"""`"auto"`: the tokenizer's template if it has one. `True`: it must have. `False`: none. Else a Jinja file."""

Metadata = Sequence[Mapping[str, Any]]  # the other columns of each prompt

KWARGS_COLUMN = "chat_template_kwargs"
DOCUMENTS_COLUMN = "documents"


class ChatFormatter:
    """Encodes prompts, and prompts with an answer, for one tokenizer.

    With a template a plain-text prompt becomes one user message. The template writes its own special tokens, so the
    tokenizer adds none; without a template the tokenizer adds its usual ones, except for a `bos` that the text
    already starts with. Control tokens are those that the template writes: what a message spells is text. With
    `chat_template=False` those in the text of a prompt count as well, but never those in an answer.

    Args:
        tokenizer: Of the policy or of a reward model.
        chat_template: See `ChatTemplate`.
        chat_template_kwargs: Arguments for the template, such as `{"enable_thinking": False}`.
        tools_column: Column of `metadata` with the tools of a chat (JSON schemas); None = no tools. A column
            `documents` reaches a template that reads it, and a column `chat_template_kwargs` adds arguments.

    Raises:
        ValueError: if `chat_template` is True and the tokenizer has none, or is a path that is no file; if there are
            arguments and no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: ChatTemplate = "auto",
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools_column: str | None = "tools",
    ) -> None:
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
        self.is_raw = chat_template is False
        self.kwargs = dict(chat_template_kwargs or {})
        self.tools_column = tools_column
        self._told: set[str] = set()
        if self.kwargs and not self.uses_template:
            raise UserError(
                f"chat_template_kwargs={self.kwargs} needs a chat template, and prompts are used as plain text here."
            )
        self._check_kwargs(self.kwargs)

    def encode_prompts(
        self, prompts: Sequence[Prompt], *, metadata: Metadata | None = None, system_prompt: str | None = None
    ) -> list[list[int]]:
        """Token ids of each prompt, up to where the answer begins: the template's generation prompt included, and no
        `eos` that the tokenizer would append. `metadata` are the other columns of each prompt."""
        if self.uses_template:
            rows = zip(prompts, metadata or [{}] * len(prompts), strict=True)
            chats = [(_as_chat(prompt, system_prompt), self._arguments(row, of_prompt=True)) for prompt, row in rows]
            self._warn_of_spelled(prompts)
            return self._encoder.encode([self._render(*chat, generate=True) for chat in chats])
        if system_prompt is not None:
            raise UserError(
                "system_prompt needs a chat template, and prompts are used as plain text here: put it into the prompts."
            )
        texts = [self._plain(p) for p in prompts]
        if not self.is_raw:
            bos = self.tokenizer.bos_token or ""
            self._warn_of_spelled([str(p).removeprefix(bos) for p in prompts])
        appended = len(self._encoder.around[1])
        return [row[: len(row) - appended] for row in self._encoder.encode(texts, special=True)]

    def encode_answers(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, metadata: Metadata | None = None
    ) -> list[list[int]]:
        """Token ids of each prompt followed by its answer: an assistant message, or text appended to text. `metadata`
        are the other columns of each prompt."""
        pairs = list(zip(prompts, answers, metadata or [{}] * len(prompts), strict=True))
        if not self.uses_template:
            return self._encoder.encode([self._plain(p, a) for p, a, _ in pairs], special=True)
        if pairs and self._turns is not None and not self._turns.has_answer:
            raise UserError("the chat template leaves out what the assistant says: no answer can be told from another.")
        chats = [([*_as_chat(p), {"role": "assistant", "content": a}], self._arguments(row)) for p, a, row in pairs]
        return self._encoder.encode([self._render(*chat, generate=False) for chat in chats])

    def warn_of_template(self, system_prompt: str | None = None) -> None:
        """Warn if the template writes nothing for the policy to answer after, or leaves `system_prompt` out."""
        turns = self._turns if self.uses_template else None
        if turns is not None and not turns.prompts_generation:
            self._warn(
                "the chat template emits no generation prompt: add_generation_prompt=True makes no difference, and "
                "nothing tells the policy that it is to answer. Name a template that has one in chat_template."
            )
        if turns is not None and system_prompt is not None:
            chat = _as_chat("a", system_prompt)
            self._warn_of_dropped(chat, self._apply(chat, self.kwargs, generate=True))

    @property
    def columns(self) -> list[str]:
        """The columns of a data set that the template may read."""
        named = (self.tools_column, DOCUMENTS_COLUMN, KWARGS_COLUMN) if self.uses_template else ()
        return [column for column in named if column is not None]

    def _render(self, chat: list[Message], arguments: dict[str, Any], *, generate: bool) -> Text:
        """The text that the template makes of a chat; in pieces where a message spells a control token."""
        mark = self._encoder.mark_for((chat, arguments))
        if mark is None:
            text = self._apply(chat, self.kwargs | arguments, generate=generate)
            pieces = [text]
        else:
            chat_, arguments_ = self._encoder.marked((chat, arguments), mark)
            pieces = split_at(self._apply(chat_, self.kwargs | arguments_, generate=generate), mark)
            text = "".join(pieces)
        self._warn_of_dropped(chat, text)
        for part in (m["content"] for m in chat if isinstance(m.get("content"), list | dict)):
            if part and repr(part) in text:
                raise UserError(
                    f"the chat template writes a content of parts as Python shows it, {repr(part)[:60]}...: give "
                    "content as one text, or a template that reads parts."
                )
        return text if mark is None else pieces

    def _apply(self, chat: list[Message], arguments: Mapping[str, Any], *, generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, tokenize=False, add_generation_prompt=generate, **arguments
            )
        except Exception as error:  # a template runs code of its own: a TypeError is as much its refusal as a raise
            roles = [message["role"] for message in chat]
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template refuses a chat with the roles {roles}: {reason}") from error

    def _plain(self, prompt: Prompt, answer: str = "") -> Text:
        if not isinstance(prompt, str):
            raise UserError(
                f"a prompt is a chat, but the tokenizer of {self.tokenizer.name_or_path!r} has no chat template (or "
                "chat_template=False): give chat_template the path of a Jinja file, or use plain-text prompts."
            )
        bos, bos_id = self.tokenizer.bos_token or "", self.tokenizer.bos_token_id
        start = bos if prompt.startswith(bos) else ""
        body = prompt.removeprefix(start)
        if bos_id in self._encoder.around[0]:
            start = ""
        mark = self._encoder.mark_for([answer] if self.is_raw else [body, answer], prompt)
        if mark is None:
            return start + body + answer
        marked = start + (body if self.is_raw else self._encoder.marked(body, mark))
        return split_at(marked + self._encoder.marked(answer, mark), mark)

    def _arguments(self, row: Mapping[str, Any], *, of_prompt: bool = False) -> dict[str, Any]:
        """What the columns of a row add to the template's arguments."""
        arguments: dict[str, Any] = {}
        columns = {"tools": self.tools_column, "documents": DOCUMENTS_COLUMN if "documents" in self._names else None}
        for argument, column in columns.items():
            if column is not None and (value := _parsed(row.get(column))):
                if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
                    raise UserError(
                        f"column {column!r} must hold a list of objects for the chat template, got {value!r:.80}"
                        + ("; tools_column names another column, null none." if argument == "tools" else ".")
                    )
                arguments[argument] = value
        if "tools" in arguments and "tools" not in self._names:
            self._warn(
                f"the chat template of {self.tokenizer.name_or_path!r} never reads `tools`: those of a prompt do not "
                "reach the model."
            )
        own = _parsed(row.get(KWARGS_COLUMN)) if of_prompt else None
        if own:
            if not isinstance(own, Mapping):
                raise UserError(f"column {KWARGS_COLUMN!r} must hold an object, got {own!r:.80}.")
            self._check_kwargs(own)
            arguments |= own
        return arguments

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if not kwargs:
            return
        taken = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        if given := sorted(taken & set(kwargs)):
            raise UserError(f"chat_template_kwargs must not have {', '.join(given)}: that is set otherwise here.")
        for name in sorted(set(kwargs) - self._names):
            self._warn(f"chat_template_kwargs: the chat template never mentions {name!r}, which has no effect.")

    def _warn_of_dropped(self, chat: list[Message], text: str) -> None:
        """Warn of what the template leaves out, apart from earlier answers, of which some leave the reasoning out."""
        for message in chat:
            role, content = message["role"], message.get("content")
            if role == "assistant" or not isinstance(content, str) or content.strip() in text:
                continue
            if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                self._warn(f"the chat template leaves the message of the role {role!r} out, or changes its text.")

    def _warn_of_spelled(self, prompts: Sequence[Prompt]) -> None:
        if "spelled" not in self._told:
            found = (self._encoder.pattern.search(text) for prompt in prompts for text in strings_in(prompt))
            if (match := next(filter(None, found), None)) is not None:
                self._told.add("spelled")
                self._warn(
                    f"prompts spell control tokens of the tokenizer, {match[0]!r} for one: they are encoded as text. "
                    "If a template was applied to the prompts already, set chat_template=false."
                )

    def _warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)

    @cached_property
    def _encoder(self) -> TextEncoder:
        if not self.uses_template or self._turns is None:
            return TextEncoder(self.tokenizer)
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if not t.special]
        return TextEncoder(self.tokenizer, turn_tokens(self._try, self._turns, added))

    @cached_property
    def _turns(self) -> Turns | None:
        return probe_turns(self._try)

    def _try(self, chat: list[Message], generate: bool) -> str:
        return self._apply(chat, self.kwargs, generate=generate)

    @cached_property
    def _names(self) -> set[str]:
        if not self.uses_template:
            return set()
        own = self.template or self.tokenizer.chat_template
        return set().union(*map(names_in, own.values() if isinstance(own, dict) else [own]))


def _as_chat(prompt: Prompt, system_prompt: str | None = None) -> list[Message]:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is None or chat[0]["role"] == "system":
        return chat
    return [{"role": "system", "content": system_prompt}, *chat]


def _parsed(value: Any) -> Any:
    """`value`, or what it spells if it is a text of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def check_template(chat_template: ChatTemplate) -> None:
    """Refuse a `ChatTemplate` that is neither true, false, auto nor the path of a file."""
    if isinstance(chat_template, str) and chat_template != "auto" and not Path(chat_template).expanduser().is_file():
        raise UserError(
            'chat_template must be "auto", true, false or the path of a Jinja file; no file is at '
            f"{Path(chat_template).expanduser().absolute()}."
        )
