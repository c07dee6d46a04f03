"""Error messages about settings: the whole key, the file that sets it, what is expected, and the nearest valid name."""

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

import tealightning
from tealightning.cli.user_settings import (
    SECTIONS,
    TOP_LEVEL,
    Setting,
    class_names,
    class_of,
    flat_settings,
    takes_class,
    user_settings,
)
from tealightning.errors import UserError
from tealightning.registry import did_you_mean

_ABOUT_SETTINGS = (ValueError, TypeError, OverflowError, ImportError, OSError, MisconfigurationException)
"""What constructors and checks raise about a setting, here, in Lightning, in torch and in a user's own classes."""
_PACKAGE = Path(tealightning.__file__).parent
_MANY = 12  # names, which are then not all listed


# ---------------------------------------------------------------- errors of constructors and checks


@contextmanager
def naming_settings(config: Any, args: Sequence[str], key: str = "") -> Iterator[None]:
    """Raise errors about a setting as a `UserError` with the whole key and the file that sets it; defects as they are.

    Args:
        config: The resolved configuration.
        args: The command line.
        key: The setting that is checked; empty = that of the class whose constructor raises.
    """
    try:
        yield
    except _ABOUT_SETTINGS as error:
        source, key = (error, key) if key else _constructor_error(error, config)
        if _is_defect(source) or (isinstance(source, UserError) and source.key):
            raise source from source.__cause__
        if "Does not validate against" in str(source):  # the parser's, about what a class says of its arguments
            named = parse_error(str(source), args)
        else:
            message = _with_key(str(source), key, config)
            named = UserError(message, key=key, file=_file_of(message, args))
        cause = None if isinstance(source, UserError) else source
        raise named.with_traceback(source.__traceback__) from cause


def _is_defect(error: BaseException) -> bool:
    """Whether this package failed: what it raises on purpose is a `UserError`."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    return not isinstance(error, (UserError, OSError)) and raised_in.is_relative_to(_PACKAGE)


def _constructor_error(error: BaseException, config: Any) -> tuple[BaseException, str]:
    """The error that says what is wrong, which the parser may have wrapped, and the key of the class that raised it."""
    settings = list(flat_settings("", config.as_dict(), ""))
    keys = [key for key in dict.fromkeys(s.key for s in settings) if key in SECTIONS or takes_class(key)]
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for candidate in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(candidate.__traceback__))):
            if frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.f_locals:
                cls = type(frame.f_locals["self"])
                if key := next((key for key in keys if class_of(key, settings) is cls), ""):
                    return candidate, key
    return error, ""


def _with_key(message: str, key: str, config: Any) -> str:
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
        matches = {name: re.search(pattern.format(name), message) for name in arguments}
        if places := {name: match.start() for name, match in matches.items() if match}:
            return min(places, key=lambda name: places[name])
    values = {name: rf"(?<![\w.]){re.escape(str(value))}(?!\.?\w)" for name, value in arguments.items()}
    by_value = [name for name, pattern in values.items() if re.search(pattern, message)]
    return by_value[0] if len(by_value) == 1 else ""


def _arguments(key: str, config: Any) -> dict[str, Any]:
    """What the class at `key` takes, with the values that it gets."""
    settings = list(flat_settings("", config.as_dict(), ""))
    values = {setting.key: setting.value for setting in settings}
    return {name: values.get(f"{key}.{name}") for name in _parameters(class_of(key, settings))}


def _parameters(cls: type | None) -> dict[str, inspect.Parameter]:
    return {} if cls is None else dict(inspect.signature(cls).parameters)


def _file_of(message: str, args: Sequence[str]) -> str:
    """The file that sets what `message` begins with; empty for an option, a default and a whole class."""
    match = re.match(r"[\w.]*\w", message)
    if match is None or takes_class(match[0]):
        return ""
    return next((s.file for s in reversed(user_settings(args)) if s.key == match[0]), "")


# ---------------------------------------------------------------- errors of the parser


def parse_error(message: str, args: Sequence[str]) -> UserError:
    """jsonargparse's `message` about the command line `args`, rewritten; an unknown kind comes back on one line."""
    settings = user_settings(args)
    key_match = re.search(r'Parser key "([^"]+)"', message)
    setting = _setting_of(key_match[1] if key_match else "", message, settings)
    for pattern, write in _KINDS:
        if match := re.search(pattern, message, re.DOTALL):
            written = write(match, setting.key, settings)
            if isinstance(written, UserError):
                return written
            return UserError(written, key=setting.key, file=setting.file if written.startswith(setting.key) else "")
    return UserError(" ".join(message.split()))


def _setting_of(name: str, message: str, settings: Sequence[Setting]) -> Setting:
    """The setting that the parser names by the last parts of its key: the one with the value in the message first."""
    value = re.search(r"[Gg](?:ot|iven) value: (.*)$", message, re.DOTALL)
    ends = [s for s in settings if name and f".{s.key}".endswith(f".{name}")]
    same_value = [s for s in ends if value and str(s.value) == value[1].strip()]
    return (same_value or ends or [Setting(key=name, value=None, file="")])[-1]


def _unknown_setting(match: re.Match[str], key: str, settings: Sequence[Setting]) -> UserError:
    name = match[1].partition("=")[0]
    if name == "class_path":
        return UserError(
            "Arguments of a class go under init_args: "
            "{class_path: tealightning.estimators.TEA, init_args: {target_n: 64}}."
        )
    named = [setting for setting in reversed(settings) if f".{name}." in f".{setting.key}."]
    for setting in named:
        if found := _first_unknown(setting.key, settings):
            key, valid = found
            hint = did_you_mean(key.rpartition(".")[2], valid, list_up_to=_MANY)
            return UserError(f"Unknown setting {key!r}.{hint}", key=key, file=setting.file)
    key = named[0].key if named else name
    return UserError(f"Unknown setting {key!r}. `tealightning fit --help` lists the settings.", key=key)


def _first_unknown(key: str, settings: Sequence[Setting]) -> tuple[str, Sequence[str]] | None:
    """The part of the dotted `key` that its section does not have, and what the section has."""
    parts = key.split(".")
    if parts[0] not in TOP_LEVEL:
        return parts[0], TOP_LEVEL
    for depth in range(1, len(parts)):
        cls = class_of(".".join(parts[:depth]), settings)
        if cls is None:
            return None
        valid = [name for name in _parameters(cls) if name != "params"]
        if parts[depth] not in valid:
            return ".".join(parts[: depth + 1]), valid
    return None


def _stray(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"Unexpected argument {match[1]!r}: a setting is --name=value, a file is -c file.yaml."


def _wrong_type(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"{key}: expected {_in_words(match[1])}, got {match[2].strip()!r}."


def _wrong_union(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    if takes_class(key) and re.fullmatch(r"[\w.]+", match[2].strip()):
        return _no_such_class(key, match[2].strip())
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
    return f"{_setting_of(match[1], '', settings).key} {match[2]}"


def _unknown_class(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return _no_such_class(key, match["path"], match.groupdict().get("reason") or "")


def _no_such_class(key: str, path: str, reason: str = "") -> str:
    detail = f" ({' '.join(reason.split())})" if reason else ""
    hint = did_you_mean(path.rpartition(".")[2], class_names(key), list_up_to=_MANY)
    if "No module named" in reason:
        hint = " Is its folder on PYTHONPATH? `--import path/to/file.py` loads a file from anywhere."
    return f"{key}: there is no class {path!r}{detail}.{hint}"


def _wrong_class(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    return f"{key}: {match[1]} is no {match[2]}.{did_you_mean('', class_names(key), list_up_to=_MANY)}"


def _missing(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    bare = re.sub(r"\b(fit|validate|test)\.", "", match[1]).split(", ")
    names = ", ".join(_required_key(name, settings) for name in bare)
    return f"Not set: {names}. Start from a config: `tealightning fit -c configs/quickstart.yaml`."


def _required_key(name: str, settings: Sequence[Setting]) -> str:
    """The whole key of a setting without a default that the parser names by its last part."""
    set_keys = [setting.key for setting in settings if setting.value is not None]
    for section in dict.fromkeys([*set_keys, *SECTIONS]) if name not in TOP_LEVEL else ():
        parameter = _parameters(class_of(section, settings)).get(name)
        if parameter is not None and parameter.default is parameter.empty and f"{section}.{name}" not in set_keys:
            return f"{section}.{name}"
    return name


def _no_file(match: re.Match[str], key: str, settings: Sequence[Setting]) -> str:
    path = Path(match[1])
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key}: there is no file {match[1]}.{hint}"


_Writer = Callable[[re.Match[str], str, Sequence[Setting]], str | UserError]
_KINDS: tuple[tuple[str, _Writer], ...] = (
    (r"\n\s*- ((?:\w+\.)+\w+) ((?:must|is) [^\n]+)", _own_check),
    (r"Option '([^']+)' is not accepted", _unknown_setting),
    (r"does not accept option '([^']+)'", _unknown_setting),
    (r"[Uu]nrecognized arguments: --(\S+)", _unknown_setting),
    (r"Key '([^']+)' is not expected", _unknown_setting),
    (r"[Uu]nrecognized arguments: (\S+)", _stray),
    (r"arguments? (?:is|are) required: (.+)$", _missing),
    (r"File does not exist: '(.+)'", _no_file),
    (r"Path is not a file: '(.+)'", _no_file),
    (r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<reason>[^\n]+)", _unknown_class),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_class),
    (
        r"expects a function or a callable class: (?P<reason>.+)\. Got value: .*class_path='(?P<path>[^']+)'",
        _unknown_class,
    ),
    (r"Subtypes: \[([^\n]*)\]\n.*Given value: (.*)$", _wrong_union),
    (r"Expected a dot import path string: (?P<path>\S+)", _unknown_class),
    (r"Expected an? (.+?)\. Got value: (.*)$", _wrong_type),
)
"""What a message looks like -> what it is rewritten as; the first that fits."""
