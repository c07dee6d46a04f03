"""A reward computed by a Python function of the user's."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from tealightning.registry import did_you_mean, register
from tealightning.rewards.base import Reward
from tealightning.types import Prompt


@register
class FunctionReward(Reward):
    """Calls `function(prompts=..., completions=..., metadata=...)`, which returns one number per completion.

    `None` and NaN mean "could not be scored". The function may be `async`. It gets as many prompts and metadata as
    completions: row i of each belongs to completion i.

    Args:
        function: `package.module:function`, `package.module.function`, `path/to/file.py:function` or a callable.

    Raises:
        ValueError: if there is no such function.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.function = _import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(f"function must be a path to a function or a callable, got {self.function!r}.")

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Sequence[float]:
        """What the function returns.

        Raises:
            RuntimeError: if the function raises; its own exception is the cause.
        """
        try:
            values = self.function(prompts=prompts, completions=completions, metadata=metadata)
            return _run(values) if inspect.iscoroutine(values) else values
        except Exception as error:  # whatever the user's code raises gets the context that its traceback lacks
            raise RuntimeError(
                f"reward function {self.name!r} raised {type(error).__name__} on {len(completions)} completions: "
                f"{error}"
            ) from error


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result, also where an event loop is already running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _import_function(path: str) -> Any:
    separator = ":" if ":" in path else "."
    module_name, _, function_name = path.rpartition(separator)
    if not module_name or not function_name:
        raise ValueError(
            "function must be package.module:function, package.module.function or path/to/file.py:function, "
            f"got {path!r}."
        )
    is_file = module_name.endswith(".py")
    module = _import_file(Path(module_name).expanduser()) if is_file else _import_module(module_name, function_name)
    if not hasattr(module, function_name):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{module_name} has no function {function_name!r}.{did_you_mean(function_name, public)}")
    return getattr(module, function_name)


def _import_module(module_name: str, function_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists and imports something that does not: its own message is the right one
        file = Path(*module_name.split(".")).with_suffix(".py")
        hint = (
            f"Did you mean {str(file)!r}, written as {file}:{function_name}?"
            if file.is_file()
            else (f"Install the package that holds it, or name its file: path/to/file.py:{function_name}.")
        )
        raise ValueError(f"function: there is no module {module_name!r} to import. {hint}") from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"function: there is no file {file.absolute()}.")
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look a function's module up
    spec.loader.exec_module(module)
    return module
