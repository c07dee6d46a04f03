"""Rewrite parser errors as one sentence: setting, what was expected, what came, the nearest valid name."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tealightning.cli.user_settings import (
    SECTIONS,
    TOP_LEVEL,
    Setting,
    class_names,
    class_of,
    given_settings,
    takes_class,
)


def explain(message: str, args: Sequence[str]) -> str:
    """jsonargparse's `message` about `args`, rewritten; an unknown kind of message comes back on one line."""
    settings = given_settings(args)
    key_match = re.search(r'Parser key "([^"]+)"', message)
    key, source = _full_key(key_match[1], message, settings) if key_match else ("", "")
    for pattern, write in _KINDS:
        if match := re.search(pattern, message, re.DOTALL):
            told = write(match, key, settings)
            return f"{source}: {told}" if source and told.startswith(key) else told
    return " ".join(message.split())


# ---------------------------------------------------------------- unknown settings


def _unknown_setting(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    name = match[1].partition("=")[0]
    if name == "class_path":
        return (
            "Arguments of a class go under init_args: "
            "{class_path: tealightning.estimators.TEA, init_args: {target_n: 64}}."
        )
    named = [setting for setting in reversed(settings) if f".{name}." in f".{setting.key}."]
    for setting in named:
        if found := _first_unknown(setting.key, settings):
            unknown, valid = found
            return f"{_where(setting.source)}Unknown setting {unknown!r}.{_nearest(unknown, valid)}"
    key = named[0].key if named else name
    return f"Unknown setting {key!r}. `tealightning fit --help` lists the settings."


def _first_unknown(key: str, settings: Sequence[Setting]) -> tuple[str, list[str]] | None:
    """The part of the dotted `key` that its section does not have, and what the section has."""
    parts = key.split(".")
    if parts[0] not in TOP_LEVEL:
        return parts[0], list(TOP_LEVEL)
    for depth in range(1, len(parts)):
        cls = class_of(".".join(parts[:depth]), settings)
        if cls is None:
            return None
        valid = [name for name in inspect.signature(cls).parameters if name != "params"]
        if parts[depth] not in valid:
            return ".".join(parts[: depth + 1]), valid
    return None


def _nearest(name: str, valid: Iterable[str]) -> str:
    """ " Did you mean ...?" with the nearest of `valid`, and all of them where they are few."""
    by_lower = {v.lower(): v for v in valid}
    near = [by_lower[n] for n in difflib.get_close_matches(name.rpartition(".")[2].lower(), by_lower, n=3, cutoff=0.55)]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return hint + (f" Valid: {', '.join(sorted(by_lower.values()))}." if len(by_lower) <= 12 else "")


def _where(source: str) -> str:
    return f"{source}: " if source else ""


# ---------------------------------------------------------------- values


def _full_key(key: str, message: str, settings: Sequence[Setting]) -> tuple[str, str]:
    """The parser names a setting inside a class by its last part: (dotted key, file)."""
    value = re.search(r"[Gg](?:ot|iven) value: (.*)$", message, re.DOTALL)
    ends = [s for s in settings if f".{s.key}".endswith(f".{key}")]
    same_value = [s for s in ends if value and str(s.value) == value[1].strip()]
    found = (same_value or ends or [Setting(key=key, value=None, source="")])[-1]
    return found.key, found.source


def _wrong_type(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"{key}: expected {_in_words(match[1])}, got {match[2].strip()!r}."


def _wrong_union(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    if takes_class(key) and re.fullmatch(r"[\w.]+", match[2].strip()):
        return _no_class(key, match[2].strip())
    types = [_in_words(t) for t in re.split(r",\s*(?![^\[]*\])", match[1])]
    expected = [t for t in types if t != "null" and "Tensor" not in t] or types
    return f"{key}: expected {' or '.join(dict.fromkeys(expected))}, got {match[2].strip()!r}."


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping",
    "NoneType": "null",
    **dict.fromkeys(("list", "tuple", "Sequence", "Iterable"), "a list"),
}


def _in_words(type_text: str) -> str:
    """`<class 'int'>` -> `an integer`; `typing.Literal['a', 'b']` -> `'a' or 'b'`."""
    if match := re.fullmatch(r"typing\.Literal\[(.*)\]", type_text):
        return " or ".join(match[1].split(", "))
    name = re.sub(r"<class '(.*)'>", r"\1", type_text).partition("[")[0].rpartition(".")[2]
    return _WORDS.get(name, f"settings of {name} (key: value)")


def _own_check(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    """What a dataclass of settings says about itself, `lora.rank must be ...`, amid what else the parser tried."""
    return f"{_full_key(match[1], '', settings)[0]} {match[2]}"


# ---------------------------------------------------------------- classes


def _unknown_class(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    path, reason = match[1], " ".join(match[2].split()) if match.re.groups > 1 and match[2] else ""
    return _no_class(key, path, reason)


def _no_class(key: str, path: str, reason: str = "") -> str:
    detail = f" ({reason})" if reason else ""
    hint = _nearest(path, class_names(key))
    if "No module named" in reason:
        hint = " Is its folder on PYTHONPATH? `--import path/to/file.py` loads a file from anywhere."
    return f"{key}: there is no class {path!r}{detail}.{hint}"


def _wrong_class(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"{key}: {match[1]} is no {match[2]}.{_nearest('', class_names(key))}"


def _callable_class(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return _no_class(key, match[2], match[1])


# ---------------------------------------------------------------- the rest


def _missing(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    bare = re.sub(r"\b(fit|validate|test)\.", "", match[1]).split(", ")
    names = ", ".join(_required_key(name, settings) for name in bare)
    return f"Not set: {names}. Start from a config: `tealightning fit -c configs/quickstart.yaml`."


def _required_key(name: str, settings: Sequence[Setting]) -> str:
    """The whole key of a setting without a default that the parser names by its last part."""
    given = [setting.key for setting in settings if setting.value is not None]
    for section in dict.fromkeys([*given, *SECTIONS]) if name not in TOP_LEVEL else ():
        cls = class_of(section, settings)
        parameter = inspect.signature(cls).parameters.get(name) if cls is not None else None
        if parameter is not None and parameter.default is parameter.empty and f"{section}.{name}" not in given:
            return f"{section}.{name}"
    return name


def _no_file(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    path = Path(match[1])
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key}: there is no file {match[1]}.{hint}"


def _stray(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"Unexpected argument {match[1]!r}: a setting is --name=value, a file is -c file.yaml."


_KINDS = (
    (r"\n\s*- ((?:\w+\.)+\w+) ((?:must|is) [^\n]+)", _own_check),
    (r"Option '([^']+)' is not accepted", _unknown_setting),
    (r"does not accept option '([^']+)'", _unknown_setting),
    (r"[Uu]nrecognized arguments: --(\S+)", _unknown_setting),
    (r"Key '([^']+)' is not expected", _unknown_setting),
    (r"[Uu]nrecognized arguments: (\S+)", _stray),
    (r"arguments? (?:is|are) required: (.+)$", _missing),
    (r"File does not exist: '(.+)'", _no_file),
    (r"Path is not a file: '(.+)'", _no_file),
    (r"Problem with given class_path '([^']+)':\s*([^\n]+)", _unknown_class),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_class),
    (r"expects a function or a callable class: (.+)\. Got value: .*class_path='([^']+)'", _callable_class),
    (r"Subtypes: \[([^\n]*)\]\n.*Given value: (.*)$", _wrong_union),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"Expected an? (.+?)\. Got value: (.*)$", _wrong_type),
)
"""What a message looks like -> how it is told; the first that fits."""
