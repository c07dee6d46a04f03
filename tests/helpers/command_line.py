"""`tealightning` in this process."""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tealightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
PROSE = str(CONFIGS / "experiments" / "prose.yaml")


@dataclass(kw_only=True, slots=True)
class Result:
    status: int
    out: str
    err: str


def run(*args: Any) -> Result:
    """`tealightning ARGS`; an exception that is no exit is a traceback, and fails the test."""
    out, err = io.StringIO(), io.StringIO()
    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(a) for a in args])
    except SystemExit as exit_:
        status = exit_.code or 0
    finally:
        torch.set_float32_matmul_precision(precision)
        os.environ.clear()
        os.environ.update(environment)
    return Result(status=status, out=out.getvalue(), err=err.getvalue())


def resolved(*args: Any, command: str = "fit") -> dict[str, Any]:
    """The configuration that `tealightning fit ARGS` would run with."""
    result = run(command, *args, "--print_config")
    assert result.status == 0, result.err
    return yaml.safe_load(result.out)


def overlay(folder: Path, settings: dict[str, Any] | str, name: str = "overlay.yaml") -> str:
    """A config file with these settings; returns its path."""
    file = folder / name
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
    return str(file)
