"""Check that the values of a YAML file have the types of their fields."""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def check_types(values: Mapping[str, Any], cls: type, prefix: str = "") -> None:
    """
    Raises:
        ValueError: for a value that has not the type of the field of `cls`, naming field, type and value.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        _check(f"{prefix}{name}", value, hints[name])


def _check(key: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):  # which of them?
        for name, inner in value.items():
            _check(f"{key}.{name}", inner, typing.get_args(hint)[1])
    if not fits(value, hint):
        raise ValueError(f"{key} must be {in_words(hint)}, got {value!r}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is a `hint`: a plain type, a union, a list or a mapping; other classes are not looked into."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and _all_fit(value, inner[0])
    if origin is dict:
        return isinstance(value, Mapping) and _all_fit(value, inner[0]) and _all_fit(value.values(), inner[1])
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint not in _WORDS or hint is Any or isinstance(value, hint)


def in_words(hint: Any) -> str:
    """`list[int] | None` -> `a list or null`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(one) for one in inner)
    if origin is list:
        return f"a list of {_plural(inner[0])}"
    if origin is dict:
        return f"a mapping of names to {_plural(inner[1])}"
    return _WORDS.get(hint, "a mapping")


def _plural(hint: Any) -> str:
    words = {int: "integers", float: "numbers", str: "texts"}
    return words.get(hint, "mappings" if typing.get_origin(hint) is dict else "values")


def _all_fit(values: Iterable[Any], hint: Any) -> bool:
    return all(fits(value, hint) for value in values)
