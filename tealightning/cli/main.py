"""Entry point: picks the command, imports plug-ins, and prints errors that the user can mend as one message."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tealightning
from tealightning.checks import check_text
from tealightning.cli.console import quiet_startup
from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.reliability.progress import owns_process

USAGE = """\
usage: tealightning COMMAND [options]

Post-train language models for best-of-N deployment.

commands:
  quickstart  GRPO against TEA in mazes: a table and two pictures in minutes
  fit         train a policy           tealightning fit -c configs/quickstart.yaml
  validate    best-of-n on the validation prompts
  test        best-of-n on the test prompts
  playground  build an embedded world: policy, prompts, reward
  compare     head-to-head ablation    tealightning compare -c configs/ablations/maze.yaml
  estimators  list the advantage estimators with objective and parameters
  diagnose    gradients: how faithful the estimators are; tail: whether a reward's tail suits them

options of every command:
  --import FILE_OR_MODULE  load a file with your own @register-ed classes first (repeatable)
  --debug                  show the full traceback of an error
  --version                print the version
  -h, --help               this help; `tealightning COMMAND --help` lists the command's options
"""

_MODULES = {
    "playground": "tealightning.cli.commands",
    "estimators": "tealightning.cli.commands",
    "quickstart": "tealightning.cli.quickstart",
    "compare": "tealightning.cli.compare",
    "diagnose": "tealightning.cli.diagnose",
}
"""Command -> the module whose function of that name runs it."""
_TRAINING = ("fit", "validate", "test")

_NOT_ON_PURPOSE = (
    "tealightning did not expect this error. If the traceback ends in your own code, the cause is there; if memory ran "
    "out, lower model.micro_batch_tokens; else it is a defect: please report it with the whole traceback."
)


@owns_process
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    An error that the user can mend is printed as one message, and the exit status is 2 or the error's `exit_code`.
    Every other exception is raised, with a note that says what to do about it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    given = [arg for arg in args if arg != "--debug"]
    if "--version" in given[:1]:
        print(f"tealightning {tealightning.__version__}")
        return
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        _run(given)
    except Exception as error:
        if "--debug" in args:
            raise
        # This package raises its own classes for whatever is not a defect; of others, Lightning's checks of settings
        # and what is said about files and disks is for the user.
        is_own = isinstance(error, UserError) or type(error).__module__.startswith("tealightning.")
        if not (is_own or isinstance(error, OSError) or type(error).__name__ == "MisconfigurationException"):
            error.add_note(_NOT_ON_PURPOSE)
            raise
        words = " ".join([str(error), *getattr(error, "__notes__", ())])  # a note says in which phase it happened
        hint = "" if is_own and error.__cause__ is None else "\n(--debug shows the traceback)"
        print(f"tealightning: error: {' '.join(words.split())}{hint}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from error


def _run(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tealightning", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--import", action="append", default=[], dest="plugins")
    for argument in given:  # which are printed and saved with the run
        check_text("the command line", argument)
    options, rest = parser.parse_known_args(given)
    command, *args = rest or [""]
    for plugin in options.plugins:
        import_plugin(plugin)
    quiet_startup()
    if command in _MODULES:
        getattr(importlib.import_module(_MODULES[command]), command)(args)
    elif command in _TRAINING:
        from tealightning.cli.training import build_training

        build_training(command, args, given).start()
    else:
        raise UserError(f"Unknown command {command!r}.{did_you_mean(command, [*_MODULES, *_TRAINING])}")


def import_plugin(name: str) -> None:
    """Import a Python file or a module, whose `@register`-ed classes are then known by name.

    Its folder is put on `sys.path` and on `PYTHONPATH`: the class path that is saved with the run,
    `my_estimator.MyEstimator`, then resolves in this process and in the ones it starts.

    Raises:
        UserError: if there is no such file or module.
    """
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise UserError(f"--import {name}: no such file (looked in {Path.cwd()}).")
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, known)])
    try:
        importlib.import_module(path.stem if is_file else name)
    except ModuleNotFoundError as error:
        if is_file or (error.name is not None and not name.startswith(error.name)):
            raise  # it exists, something that it imports does not
        raise UserError(f"--import {name}: no module of that name. A file ends in .py.") from error
