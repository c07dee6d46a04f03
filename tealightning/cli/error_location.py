"""Name the setting that a constructor's error is about: `model.estimator.alpha must be ...`."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from tealightning.cli.messages import explain
from tealightning.cli.user_settings import SECTIONS, Setting, class_of, flat_settings, given_settings, takes_class
from tealightning.errors import UserError

CHECKS = (ValueError, TypeError, OverflowError, ImportError, OSError, MisconfigurationException)
"""What constructors and checks raise about a setting, here, in Lightning and in torch."""


class SettingError(UserError):
    """A setting that cannot be used; the message names it. The traceback is that of the check that found it."""


@contextmanager
def located(config: Any, args: Sequence[str], key: str = "") -> Iterator[None]:
    """Errors of the classes that are built inside, as `SettingError` with the whole key and the file that sets it.

    Args:
        config: The resolved configuration.
        args: The command line.
        key: What is checked; empty = the class whose constructor raised decides.
    """
    try:
        yield
    except SettingError:
        raise
    except CHECKS as error:
        source, found = _source_of(error, config)
        if "Does not validate against" in str(source):  # the parser's, about what a class says of its arguments
            raise SettingError(explain(str(source), args)).with_traceback(source.__traceback__) from None
        told = _told(str(source), key or found, config)
        raise SettingError(_where(told, args) + told).with_traceback(source.__traceback__) from None


def _source_of(error: BaseException, config: Any) -> tuple[BaseException, str]:
    """The error that says what is wrong, which the parser may have wrapped, and the key of the class that raised it."""
    settings = list(flat_settings("", config.as_dict(), ""))
    candidates: list[BaseException] = [error]
    while (inner := candidates[-1].__cause__ or candidates[-1].__context__) is not None:
        candidates.append(inner)
    for candidate in reversed(candidates):
        for cls in _constructing(candidate.__traceback__):
            if key := _key_of(cls, settings):
                return candidate, key
    return error, ""


def _constructing(traceback: TracebackType | None) -> list[type]:
    """The classes that were under construction, the innermost first."""
    classes = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.f_locals:
            classes.append(type(frame.f_locals["self"]))
        traceback = traceback.tb_next
    return classes[::-1]


def _key_of(cls: type, settings: Sequence[Setting]) -> str:
    for key in dict.fromkeys(setting.key for setting in settings):
        if (key in SECTIONS or takes_class(key)) and class_of(key, settings) is cls:
            return key
    return ""


def _told(message: str, key: str, config: Any) -> str:
    """`message` with the whole key in place of the argument that it begins with; else behind the key."""
    message = " ".join(message.split())
    if not key:
        return message
    arguments = _arguments(key, config)
    if (match := re.match(r"(?:\w+\.)*(\w+)(?= |=|\[|:)", message)) and match[1] in arguments:
        return f"{key}.{match[1]}{message[match.end() :]}"
    if message.startswith(key):
        return message
    about = _mentioned(message, arguments)
    return f"{key}.{about}: {message}" if about else f"{key}: {message}"


def _mentioned(message: str, arguments: dict[str, Any]) -> str:
    """The argument that a sentence of Lightning or torch is about: by its name, else by its value; empty if unclear."""
    for pattern in (r"`{}`", r"\b{}=", r"\b{}\b"):
        found = {name: match.start() for name in arguments if (match := re.search(pattern.format(name), message))}
        if found:
            return min(found, key=lambda name: found[name])
    values = {name: rf"(?<![\w.]){re.escape(str(value))}(?!\.?\w)" for name, value in arguments.items()}
    by_value = [name for name, pattern in values.items() if re.search(pattern, message)]
    return by_value[0] if len(by_value) == 1 else ""


def _arguments(key: str, config: Any) -> dict[str, Any]:
    """What the class at `key` takes, with the values that it gets."""
    settings = list(flat_settings("", config.as_dict(), ""))
    cls = class_of(key, settings)
    if cls is None:
        return {}
    given = {setting.key: setting.value for setting in settings}
    return {name: given.get(f"{key}.{name}") for name in inspect.signature(cls).parameters}


def _where(told: str, args: Sequence[str]) -> str:
    """The file that sets what `told` begins with, where it is one that the user gave."""
    match = re.match(r"[\w.]*\w", told)
    if match is None or takes_class(match[0]):
        return ""
    sources = [s.source for s in given_settings(args) if s.key == match[0]]
    return f"{sources[-1]}: " if sources and sources[-1] else ""
