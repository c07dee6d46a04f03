"""Import a user's function by its path, call it and read what it returns.

Also the script of the process in which `FunctionReward` has the function called, which is why this file uses the
standard library alone, and the package only where a message needs it.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import inspect
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

_TRACEBACK_CHARACTERS = 4000
_NO_DTYPES = ("complex", "datetime", "timedelta")  # of which `float` drops a part, or gives the nanoseconds


def import_function(function: Any) -> Any:
    """The function at `package.module:function`, `package.module.function` or `path/to/file.py:function`, or
    `function` itself if it is no path. A ValueError says that there is none, or that it cannot be called."""
    if isinstance(function, str):
        source, name = _source_and_name(function)
        try:
            module = _import_file(source) if isinstance(source, Path) else _import_module(source, name)
        except SystemExit as error:  # of a script, which would end the run as if all were done
            raise _user_error(f"function: {source} calls sys.exit({error.code!r}) when it is imported.") from error
        if not hasattr(module, name):
            from tealightning.registry import did_you_mean

            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise _user_error(f"{source} has no function {name!r}.{did_you_mean(name, public)}")
        function = getattr(module, name)
    if not callable(function):
        raise _user_error(f"function must be a path to a function or a callable, got {function!r}.")
    return function


def _import_module(module_name: str, function_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists and imports something that does not: its own message is the right one
        file = Path(*module_name.split(".")).with_suffix(".py")
        raise _user_error(
            f"function: there is no module {module_name!r} to import. Install the package that holds it, or name its "
            f"file: {file}:{function_name}."
        ) from error


def _import_file(file: Path) -> ModuleType:
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look a function's module up
    spec.loader.exec_module(module)
    return module


def function_path(function: Any) -> str:
    """The path from which another process can import `function`, a path or a function; nothing is imported to find out.

    Raises:
        ValueError: for a lambda, a function inside another one or of the main script, an object, or a path whose module
            or file does not exist.
    """
    if isinstance(function, str):
        source, name = _source_and_name(function)
        if isinstance(source, str) and not _can_be_imported(source):
            raise _user_error(f"function: there is no module {source!r} to import in the worker process.")
        return f"{source}:{name}"
    name, module_name = getattr(function, "__qualname__", ""), getattr(function, "__module__", None) or ""
    module = sys.modules.get(module_name)
    if module is None or module_name == "__main__" or getattr(module, name, None) is not function:
        raise _user_error(
            f"function: a worker process (timeout_seconds) cannot import {function!r}. Give the path of a function at "
            "the top level of a module or file other than the main script: path/to/file.py:function."
        )
    return f"{module_name if _can_be_imported(module_name) else _existing(Path(str(module.__file__)))}:{name}"


def _source_and_name(path: str) -> tuple[str | Path, str]:
    """Name of the module, or its file, and name of the function in it."""
    module_name, _, function_name = path.rpartition(":" if ":" in path else ".")
    if not module_name or not function_name:
        raise _user_error(
            "function must be package.module:function, package.module.function or path/to/file.py:function, "
            f"got {path!r}."
        )
    is_file = module_name.endswith(".py")
    return _existing(Path(module_name).expanduser()) if is_file else module_name, function_name


def _can_be_imported(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ModuleNotFoundError, ValueError):  # a parent that is no package, a module that was made by hand
        return False


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise _user_error(f"function: there is no file {file.absolute()}.")
    return file.absolute()


def call_function(function: Callable[..., Any], **arguments: Any) -> Any:
    """What `function` returns, awaited if it is `async`, also where an event loop is already running (a notebook)."""
    values = function(**arguments)
    if not inspect.iscoroutine(values):
        return values
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(values)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, values).result()


def message_of(error: BaseException) -> str:
    """`str(error)`, which may be code of the user's, too."""
    try:
        return str(error)
    except Exception as second:
        return f"(its message cannot be read: {type(second).__name__})"


# ---------------------------------------------------------------- what it returns


class NoScoresError(ValueError):
    """What came is not one number per completion; `str` of it follows the name of who returned it."""


def read_scores(values: Any, count: int) -> tuple[list[float], dict[int, str]]:
    """`count` scores in order, and what is wrong with each value that is no number, by its place; its score is NaN.

    `None` and other marks of a missing value are NaN as well, and nothing is wrong with them. What a generator raises
    is raised here.

    Args:
        values: A sequence, array, tensor, series or iterator of numbers, or a mapping from 0, 1, ... to them.
        count: How many are expected.

    Raises:
        NoScoresError: for anything else, or another number of values.
    """
    items = _items(values, count)
    if len(items) != count:
        is_endless = len(items) > count and not hasattr(values, "__len__")
        got = "more" if is_endless else f"shape ({len(values) if hasattr(values, '__len__') else len(items)},)"
        raise NoScoresError(_another_count(count, got))
    scores, problems = [], {}
    for place, item in enumerate(items):
        try:
            scores.append(_number(item))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `__float__` of a user's class may raise anything, SystemExit included
            reason = str(error) if isinstance(error, NoScoresError) else f"{type(error).__name__}: {message_of(error)}"
            problems[place] = f"value {place} is {_shown(item)}: {reason}"
            scores.append(math.nan)
    return scores, problems


def no_numbers(*reasons: str) -> str:
    """The message for values that are no numbers, after the name of who returned them."""
    more = f"; and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return f"must return one number per completion (None or NaN = unscorable): {reasons[0]}{more}."


def _another_count(count: int, got: str) -> str:
    return f"must return {count} values, one per completion, got {got}."


def _items(values: Any, count: int) -> list[Any]:
    """The values in order; of an iterator, which may have no end, at most one more than `count`."""
    shape, dtype = getattr(values, "shape", None), str(getattr(values, "dtype", "")).lower()
    if isinstance(shape, tuple) and len(shape) != 1:
        raise NoScoresError(_another_count(count, f"shape {tuple(shape)}"))
    if isinstance(values, Mapping):
        keys = list(values)
        is_index = all(isinstance(key, Integral) and not isinstance(key, bool) for key in keys)
        if not is_index or set(keys) != set(range(len(keys))):
            wanted = "the keys of a mapping must be 0, 1, ... (the completions' places)"
            raise NoScoresError(no_numbers(f"{wanted}, got {_shown(keys)}"))
        return [values[place] for place in range(len(keys))]
    # A set has no order, and an iteration over text or bytes is over characters.
    is_refused = isinstance(values, str | bytes | bytearray | memoryview | Set) or any(no in dtype for no in _NO_DTYPES)
    if is_refused or not (isinstance(values, Iterable) or hasattr(type(values), "__getitem__")):
        if inspect.iscoroutine(values):
            values.close()
        raise NoScoresError(no_numbers(f"got {_shown(values)}"))
    if hasattr(values, "tolist"):
        try:
            return list(values.tolist())
        except Exception as error:  # each library of arrays has errors of its own
            raise NoScoresError(no_numbers(f"got {_shown(values)}, which cannot be read: {error}")) from error
    return list(islice(iter(values), count + 1))


def _number(value: Any) -> float:
    if value is None or type(value).__name__ in ("NAType", "MaskedConstant"):  # of pandas, of numpy
        return math.nan
    dtype = str(getattr(value, "dtype", ""))
    has_number = hasattr(value, "__float__") or hasattr(value, "__index__")
    if isinstance(value, str | bytes | bytearray) or not has_number or any(no in dtype for no in _NO_DTYPES):
        raise NoScoresError("no number")
    return float(value.detach() if hasattr(value, "detach") else value)  # torch warns of `float` with a gradient


def _shown(value: Any) -> str:
    """A value for messages: a builtin one with its type, of others the type, because their `repr` may do anything."""
    kind = type(value).__name__
    try:
        return (
            f"{reprlib.repr(value)} ({kind})" if type(value).__module__ == "builtins" else f"an object of type {kind}"
        )
    except Exception:  # an integer of more digits than Python prints, or an element of a list
        return f"an object of type {kind}"


def _user_error(message: str) -> ValueError:
    from tealightning.errors import UserError

    return UserError(message)


# ---------------------------------------------------------------- the worker process


def serve(channel: Connection) -> None:
    """Import the function that the first message names, and answer each later one, keyword arguments, with its values:
    `("scores", list of float, problems)` as `read_scores` gives them, `("invalid", what came instead)` or `("raised",
    type, message, traceback)`."""
    setup = channel.recv()
    sys.path[:] = setup["sys_path"]
    try:
        function = import_function(setup["function"])
    except Exception as error:  # whatever importing it raises is told to the trainer
        channel.send(_raised(error))
        return
    channel.send(("ready",))
    with contextlib.suppress(EOFError):  # the trainer has closed its end
        while True:
            channel.send(_answer(function, channel.recv()))


def _answer(function: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    count = len(arguments["completions"])
    try:
        return "scores", *read_scores(call_function(function, **arguments), count)
    except NoScoresError as error:
        return "invalid", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit included: the function failed, its process need not end
        return _raised(error)


def _raised(error: BaseException) -> tuple[str, ...]:
    return "raised", type(error).__name__, message_of(error), traceback.format_exc()[-_TRACEBACK_CHARACTERS:]


if __name__ == "__main__":
    code = 1
    try:
        serve(Connection(int(sys.argv[1])))
        code = 0
    except SystemExit as error:  # of the function
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # the last frame of this process
        traceback.print_exc()
    finally:
        os._exit(code)  # without waiting for threads of the function
