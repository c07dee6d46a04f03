"""What a chat template reads and writes, found by parsing it and by trying it on a chat."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from jinja2 import Environment, TemplateSyntaxError, nodes

from tealightning.errors import UserError
from tealightning.types import Message

Render = Callable[[list[Message], bool], str]  # a chat, with or without the generation prompt

_SYSTEM, _USER, _ANSWER, _REPLY = "dingo", "quokka", "wombat", "numbat"  # words that no template writes
_GENERATION = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")  # a tag of transformers
_MARK = "\ufdd0"


@dataclass(kw_only=True, slots=True)
class Turns:
    """How a template tells the turns of a chat apart."""

    written: str  # what it writes around messages
    has_answer: bool  # it writes what the assistant says
    prompts_generation: bool  # what precedes an answer is there before one


def names_in(template: str) -> set[str]:
    """The names in a Jinja template: the variables that it may read among them."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja, in line {error.lineno}: {error.message}") from error
    return {name.name for name in tree.find_all(nodes.Name)}


def probe_turns(render: Render) -> Turns | None:
    """The turns of the template behind `render`; None = it refuses or rewrites the chat that this is tried on."""
    user, answer = _message("user", _USER), _message("assistant", _ANSWER)
    chat = [user, answer, _message("user", _REPLY)]
    try:
        longer = render(chat, False)
        answered, bare, prompted = render([user, answer], False), render([user], False), render([user], True)
    except UserError:
        return None
    if _USER not in prompted or _USER not in longer:
        return None
    to_assistant = answered.partition(_USER)[2].partition(_ANSWER)[0]
    to_user = longer.partition(_ANSWER)[2].partition(_REPLY)[0]
    # [INST] question [/INST] needs no generation prompt: the question's end is where the answer begins.
    follows = prompted.partition(_USER)[2].strip() == to_assistant.strip() and to_assistant != to_user
    try:
        written = render([_message("system", _SYSTEM), *chat], False)
    except UserError:
        # Without what comes first, which may be a system prompt of its own.
        written = longer.partition(_USER)[2]
    return Turns(
        written=written,
        has_answer=_ANSWER in answered,
        prompts_generation=prompted != bare or follows,
    )


def turn_tokens(render: Render, turns: Turns, tokens: Iterable[str]) -> Collection[str]:
    """Those of `tokens` with which the template begins and ends turns, apart from those that it looks for in messages,
    as it may do for `</think>` in answers."""
    return [t for t in tokens if t.strip() and t in turns.written and not _is_looked_for(render, t)]


def _is_looked_for(render: Render, token: str) -> bool:
    text = f"{token}x{token}"
    shown = [
        render([_message("user", content), _message("assistant", content), _message("user", content)], False)
        for content in (text, _MARK.join(text))
    ]
    return shown[0] != shown[1].replace(_MARK, "")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
