"""Import a user's function by its path and call it.

Also the script of the process in which `FunctionReward` has the function called, which is why this file uses the
standard library alone, and the package only where a message needs it.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

_TRACEBACK_CHARACTERS = 4000


def import_function(function: Any) -> Any:
    """The function at `package.module:function`, `package.module.function` or `path/to/file.py:function`, or
    `function` itself if it is no path. A ValueError says that there is none, or that it cannot be called."""
    if isinstance(function, str):
        source, name = _source_and_name(function)
        module = _import_file(source) if isinstance(source, Path) else _import_module(source, name)
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


def _user_error(message: str) -> ValueError:
    from tealightning.errors import UserError

    return UserError(message)


# ---------------------------------------------------------------- the worker process


def serve(channel: Connection) -> None:
    """Import the function that the first message names, and answer each later one, keyword arguments, with its values:
    `("scores", list of float or None)`, `("invalid", what came instead of numbers)` or `("raised", type, message,
    traceback)`."""
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
    try:
        values = call_function(function, **arguments)
    except Exception as error:
        return _raised(error)
    try:
        return "scores", [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        return "invalid", str(error)


def _raised(error: Exception) -> tuple[str, ...]:
    return "raised", type(error).__name__, str(error), traceback.format_exc()[-_TRACEBACK_CHARACTERS:]


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
