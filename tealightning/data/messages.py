"""Read a value of the prompt column as a text or a chat, with all that its messages hold, or say why it is neither."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from tealightning.errors import UserError
from tealightning.types import Message, Prompt

_ROLES_OF_TOOLS = ("tool", "function", "ipython")  # whose content may be any value


def as_prompt(value: Any) -> Prompt:
    """`value` as a prompt: a text, or a chat whose messages have a role, a content or something in its place, and
    whatever else a chat template reads. Keys without a value are left out: Arrow gives every message the keys of all.
    A text that spells a chat, as files of CSV hold it, is that chat."""
    value = _spelled(value) if isinstance(value, str) else value
    if isinstance(value, str):
        if not value.strip():
            raise UserError("it is blank" if value else "it is empty")
        return value
    if not isinstance(value, list):
        raise UserError(f"it is {'missing' if value is None else type(value).__name__}")
    if not value:
        raise UserError("it is empty")
    chat = [_message(message, number) for number, message in enumerate(value)]
    if chat[-1]["role"] == "assistant":
        raise UserError("its last message is the assistant's, which is what the policy is to write")
    asked = next((message for message in reversed(chat) if message["role"] == "user"), None)
    if asked is not None and not "".join(_texts(asked)).strip():
        raise UserError("its last message of the user is blank")
    return chat


def without_nulls(value: Any) -> Any:
    """`value` of an Arrow table without the keys that only other rows have, which are null. The `content` of a message
    may be null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(v) for key, v in value.items() if v is not None or key == "content"}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _spelled(text: str) -> Any:
    """The chat that `text` spells, as JSON or as Python shows it (so pandas writes lists into CSV), or `text`."""
    if text.lstrip().startswith(("[", "{")):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, dict) and "role" in first:
                return value
    return text


def _message(message: Any, number: int) -> Message:
    expected = f'its messages are not all {{"role": "...", "content": "..."}}: message {number}'
    if not isinstance(message, Mapping):
        raise UserError(f"{expected} is {type(message).__name__}")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise UserError(f"{expected} has no role")
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = kept.get("content")
    if content is None and not kept.keys() - {"role", "name", "content"}:
        raise UserError(f"{expected} has no content")
    if isinstance(content, list):
        kept["content"] = [_part(part, number, kept["role"]) for part in content]
    elif content is not None and not isinstance(content, str) and kept["role"] not in _ROLES_OF_TOOLS:
        raise UserError(f"{expected} has a content of type {type(content).__name__}")
    return kept


def _part(part: Any, number: int, role: str) -> Any:
    if isinstance(part, Mapping):
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type", "text")
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if role not in _ROLES_OF_TOOLS:
            raise UserError(
                f"message {number} has a part of type {kind!r} that is no text, and policies here read text alone"
            )
    elif not isinstance(part, str) and role not in _ROLES_OF_TOOLS:
        raise UserError(f"message {number} has a part that is {type(part).__name__}, not text")
    return part


def _texts(message: Message) -> list[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return [part["text"] if isinstance(part, Mapping) else part or "" for part in parts]
