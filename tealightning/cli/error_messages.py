"""Error messages about settings: the whole key, the file that sets it, what is expected, and the nearest valid name."""

import difflib
import functools
import inspect
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

import tealightning
from tealightning.cli import user_settings
from tealightning.cli.user_settings import Setting
from tealightning.errors import UserError
from tealightning.registry import did_you_mean

_ABOUT_SETTINGS = (ValueError, TypeError, OverflowError, ImportError, OSError, MisconfigurationException)
"""What constructors and checks raise about a setting, here, in Lightning, in torch and in a user's own classes."""
_PACKAGE = Path(tealightning.__file__).parent
_did_you_mean = functools.partial(did_you_mean, list_up_to=12)


@contextmanager
def naming_settings(config: Any, args: Sequence[str], key: str = "") -> Iterator[None]:
    """Raise errors about a setting as a `UserError` with the whole key and the file that sets it; defects as they are.

    `key` is the setting that is checked; empty = that of the class whose constructor raises.
    """
    try:
        yield
    except _ABOUT_SETTINGS as error:
        settings = list(user_settings.flat_settings("", config.as_dict(), ""))
        source, key = (error, key) if key else _constructor_error(error, settings)
        if _is_defect(source) or (isinstance(source, UserError) and source.key):
            raise source from source.__cause__
        if "Does not validate against" in str(source):  # the parser's, about what a class says of its arguments
            named = parse_error(str(source), args)
        else:
            message = _with_key(" ".join(str(source).split()), key, settings)
            about = re.match(r"[\w.]*\w", message)  # an option, a default and a whole class have no file
            setters = [s for s in user_settings.settings_of(args) if about and s.key == about[0]]
            is_class = bool(setters) and user_settings.takes_class(setters[-1].key)
            named = UserError(message, key=key, file=setters[-1].file if setters and not is_class else "")
        raise named.with_traceback(source.__traceback__) from (None if isinstance(source, UserError) else source)


def _is_defect(error: BaseException) -> bool:
    """Whether this package failed: what it raises on purpose is a `UserError`."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    return not isinstance(error, (UserError, OSError)) and raised_in.is_relative_to(_PACKAGE)


def _constructor_error(error: BaseException, settings: Sequence[Setting]) -> tuple[BaseException, str]:
    """The error that says what is wrong, which the parser may have wrapped, and the key of the class that raised it."""
    keys = dict.fromkeys(setting.key for setting in settings)
    classes = [key for key in keys if key in user_settings.SECTIONS or user_settings.takes_class(key)]
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for candidate in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(candidate.__traceback__))):
            if frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.f_locals:
                cls = type(frame.f_locals["self"])
                if key := next((key for key in classes if user_settings.class_of(key, settings) is cls), ""):
                    return candidate, key
    return error, ""


def _with_key(message: str, key: str, settings: Sequence[Setting]) -> str:
    """`message` with the whole key in place of the argument that it begins with; else behind the key."""
    values = {setting.key: setting.value for setting in settings}
    arguments = {name: values.get(f"{key}.{name}") for name in _parameters(user_settings.class_of(key, settings))}
    if (match := re.match(r"(?:\w+\.)*(\w+)(?= |=|\[|:)", message)) and match[1] in arguments:
        return f"{key}.{match[1]}{message[match.end() :]}"
    if message.startswith(key):
        return message
    about = _argument_mentioned(message, arguments)
    return f"{key}.{about}: {message}" if about else f"{key}: {message}"


def _argument_mentioned(message: str, arguments: dict[str, Any]) -> str:
    """The argument that a sentence of Lightning or torch is about: by its name, else by its value; empty if unclear."""
    for pattern in (r"`{}`", r"\b{}=", r"\b{}\b"):
        matches = {name: re.search(pattern.format(name), message) for name in arguments}
        if places := {match.start(): name for name, match in matches.items() if match}:
            return places[min(places)]
    values = {name: rf"(?<![\w.]){re.escape(str(value))}(?!\.?\w)" for name, value in arguments.items()}
    by_value = [name for name, pattern in values.items() if re.search(pattern, message)]
    return by_value[0] if len(by_value) == 1 else ""


def _parameters(cls: type | None) -> dict[str, inspect.Parameter]:
    return {} if cls is None else dict(inspect.signature(cls).parameters)


def parse_error(message: str, args: Sequence[str]) -> UserError:
    """jsonargparse's `message` about the command line `args`, rewritten; an unknown kind comes back on one line."""
    settings = user_settings.settings_of(args)
    search = functools.partial(re.search, string=message, flags=re.DOTALL)
    named = search(r'Parser key "([^"]+)"')
    setting = _setting_of(named[1] if named else "", message, settings)
    key = setting.key
    if match := search(r"\n\s*- ((?:\w+\.)+\w+) ((?:must|is) [^\n]+)"):  # what a class of settings says about itself
        text = f"{_setting_of(match[1], '', settings).key} {match[2]}"
    elif match := search(r"(?:[Oo]ption '|nrecognized arguments: --)([^'=\s]+)"):
        return _unknown_setting(match[1], settings)
    elif match := search(r"nrecognized arguments: (\S+)"):
        text = f"Unexpected argument {match[1]!r}: a setting is --name=value, a file is -c file.yaml."
    elif match := search(r"arguments? (?:is|are) required: (.+)$"):
        bare = re.sub(r"\b(fit|validate|test)\.", "", match[1]).split(", ")
        names = ", ".join(_required_key(name, settings) for name in bare)
        text = f"Not set: {names}. Start from a config: `tealightning fit -c configs/quickstart.yaml`."
    elif match := search(r"(?:File does not exist|Path is not a file): '(.+)'"):
        path = Path(match[1])
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        text = f"{key}: there is no file {path}." + (f" Did you mean {near[0]!r}?" if near else "")
    elif match := search(r"Import path (\S+) does not correspond to a subclass of (\w+)"):
        text = f"{key}: {match[1]} is no {match[2]}.{_did_you_mean('', user_settings.class_names(key))}"
    elif match := search(r"Problem with given class_path '([^']+)':\s*([^\n]+)"):
        text = _no_such_class(key, match[1], match[2])
    elif match := search(r"expects a function or a callable class: (.+)\. Got value: .*class_path='([^']+)'"):
        text = _no_such_class(key, match[2], match[1])
    elif match := search(r"Subtypes: \[([^\n]*)\]\n.*Given value: (.*)$"):
        value = match[2].strip()
        types = [_in_words(type_) for type_ in re.split(r",\s*(?![^\[]*\])", match[1])]
        expected = [words for words in types if words != "null" and "Tensor" not in words] or types
        is_class_name = user_settings.takes_class(key) and re.fullmatch(r"[\w.]+", value)
        wrong_type = f"{key}: expected {' or '.join(dict.fromkeys(expected))}, got {value!r}."
        text = _no_such_class(key, value) if is_class_name else wrong_type
    elif match := search(r"Expected a dot import path string: (\S+)"):
        text = _no_such_class(key, match[1])
    elif match := search(r"Expected an? (.+?)\. Got value: (.*)$"):
        text = f"{key}: expected {_in_words(match[1])}, got {match[2].strip()!r}."
    else:
        return UserError(" ".join(message.split()))
    return UserError(text, key=key, file=setting.file if text.startswith(key) else "")


def _setting_of(name: str, message: str, settings: Sequence[Setting]) -> Setting:
    """The setting that the parser names by the last parts of its key: the one with the value in the message first."""
    value = re.search(r"[Gg](?:ot|iven) value: (.*)$", message, re.DOTALL)
    ends = [s for s in settings if name and f".{s.key}".endswith(f".{name}")]
    same_value = [s for s in ends if value and str(s.value) == value[1].strip()]
    return (same_value or ends or [Setting(key=name, value=None, file="")])[-1]


def _unknown_setting(name: str, settings: Sequence[Setting]) -> UserError:
    if name == "class_path":
        example = "{class_path: tealightning.estimators.TEA, init_args: {target_n: 64}}"
        return UserError(f"Arguments of a class go under init_args: {example}.")
    named = [setting for setting in reversed(settings) if f".{name}." in f".{setting.key}."]
    for setting in named:
        if found := _first_unknown(setting.key, settings):
            key, valid = found
            hint = _did_you_mean(key.rpartition(".")[2], valid)
            return UserError(f"Unknown setting {key!r}.{hint}", key=key, file=setting.file)
    key = named[0].key if named else name
    return UserError(f"Unknown setting {key!r}. `tealightning fit --help` lists the settings.", key=key)


def _first_unknown(key: str, settings: Sequence[Setting]) -> tuple[str, Sequence[str]] | None:
    """The first part of `key` that the class before it does not take, with what it takes."""
    parts = key.split(".")
    if parts[0] not in user_settings.TOP_LEVEL:
        return parts[0], user_settings.TOP_LEVEL
    for depth in range(1, len(parts)):
        if (cls := user_settings.class_of(".".join(parts[:depth]), settings)) is None:
            return None
        valid = [name for name in _parameters(cls) if name != "params"]
        if parts[depth] not in valid:
            return ".".join(parts[: depth + 1]), valid
    return None


def _required_key(name: str, settings: Sequence[Setting]) -> str:
    """The whole key of a setting without a default that the parser names by its last part."""
    set_keys = [setting.key for setting in settings if setting.value is not None]
    for section in dict.fromkeys([*set_keys, *user_settings.SECTIONS]) if name not in user_settings.TOP_LEVEL else ():
        parameter = _parameters(user_settings.class_of(section, settings)).get(name)
        if parameter is not None and parameter.default is parameter.empty and f"{section}.{name}" not in set_keys:
            return f"{section}.{name}"
    return name


def _no_such_class(key: str, path: str, reason: str = "") -> str:
    detail = f" ({' '.join(reason.split())})" if reason else ""
    hint = _did_you_mean(path.rpartition(".")[2], user_settings.class_names(key))
    if "No module named" in reason:
        hint = " Is its folder on PYTHONPATH? `--import path/to/file.py` loads a file from anywhere."
    return f"{key}: there is no class {path!r}{detail}.{hint}"


_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "dict": "a mapping"}
_WORDS |= {"NoneType": "null", **dict.fromkeys(("list", "tuple", "Sequence", "Iterable"), "a list")}


def _in_words(type_text: str) -> str:
    """`<class 'int'>` -> `an integer`; `typing.Literal['a', 'b']` -> `'a' or 'b'`."""
    if match := re.fullmatch(r"typing\.Literal\[(.*)\]", type_text):
        return " or ".join(match[1].split(", "))
    name = re.sub(r"<class '(.*)'>", r"\1", type_text).partition("[")[0].rpartition(".")[2]
    return _WORDS.get(name, f"settings of {name} (key: value)")
