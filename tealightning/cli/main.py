"""Entry point: picks the command, loads plug-ins, and turns user errors into one clear message."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import tealightning
from tealightning.cli.plugins import import_plugin

USAGE = """\
usage: tealightning COMMAND [options]

Post-train language models for best-of-N deployment.

commands:
  fit         train a policy           tealightning fit -c configs/quickstart.yaml
  validate    best-of-n on the validation prompts
  test        best-of-n on the test prompts
  playground  build the embedded policy, reward model and prompts
  estimators  list the advantage estimators with objective and parameters

options of every command:
  --import FILE_OR_MODULE  load a file with your own @register-ed classes first (repeatable)
  --debug                  show the full traceback of an error
  --version                print the version
  -h, --help               this help; `tealightning COMMAND --help` lists the command's options
"""

_PACKAGE = Path(tealightning.__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 on a user error."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug, args = _pop_flag(args, "--debug")
    if "--version" in args[:1]:
        print(f"tealightning {tealightning.__version__}")
        return
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        plugins, args = _pop_values(args, "--import")
        for plugin in plugins:
            import_plugin(plugin)
        _run(args[0], args[1:])
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if debug or not _is_told_to_the_user(error):
            raise
        from tealightning.cli.names import shorten_error

        print(f"tealightning: error: {shorten_error(str(error))}\n(--debug shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from error


def _run(command: str, args: list[str]) -> None:
    _quiet_startup()
    if command == "playground":
        from tealightning.cli.commands import playground

        playground(args)
    elif command == "estimators":
        from tealightning.cli.commands import estimators

        estimators(args)
    else:
        from tealightning.cli.training import run_training

        run_training(command, args)


def _is_told_to_the_user(error: BaseException) -> bool:
    """True if the error was raised on purpose: by this package, or by the parser of its settings."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename) if frames else Path()
    return raised_in.is_relative_to(_PACKAGE) or raised_in.parent.name == "jsonargparse"


def _pop_flag(args: list[str], flag: str) -> tuple[bool, list[str]]:
    return flag in args, [a for a in args if a != flag]


def _pop_values(args: list[str], option: str) -> tuple[list[str], list[str]]:
    """The values of every `option VALUE` and `option=VALUE`, and the other arguments."""
    values, rest = [], []
    remaining = iter(args)
    for arg in remaining:
        if arg == option:
            value = next(remaining, None)
            if value is None:
                raise ValueError(f"{option} needs a value: a Python file or a module name.")
            values.append(value)
        elif arg.startswith(f"{option}="):
            values.append(arg.removeprefix(f"{option}="))
        else:
            rest.append(arg)
    return values, rest


def _quiet_startup() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    # Nothing is loaded by worker processes here: prompts are read from memory-mapped files.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Policies stay in eval mode on purpose: training scores tokens exactly as sampling did.
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
