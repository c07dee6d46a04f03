"""Load a user's own file or module (`--import`), so that its `@register`-ed classes are known by name."""

import importlib
import os
import sys
from pathlib import Path

from tealightning.errors import UserError


def import_plugin(name: str) -> None:
    """Import a Python file (`my_estimator.py`) or a module (`my_package.estimators`).

    The folder of a file is put on `sys.path` and on `PYTHONPATH`: the class path that is saved with the run,
    `my_estimator.MyEstimator`, then resolves in this process and in the ones it starts.

    Raises:
        ValueError: if there is no such file or module.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"--import {name}: no such file (looked in {Path.cwd()}).")
        folder = str(path.resolve().parent)
        _put_first(folder)
        importlib.import_module(path.stem)
        return
    _put_first(str(Path.cwd()))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise  # the module exists, something that it imports does not
        raise UserError(f"--import {name}: no module of that name. A file ends in .py.") from error


def _put_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, known)])
