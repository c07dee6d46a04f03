"""Entry point: picks the command, loads plug-ins, and turns user errors into one clear message."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tealightning
from tealightning.cli.console import quiet_startup
from tealightning.cli.plugins import import_plugin
from tealightning.errors import UserError
from tealightning.reliability.progress import own_process

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

_PACKAGE = Path(tealightning.__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 on a user error."""
    if argv is None:
        own_process()
    args = list(sys.argv[1:] if argv is None else argv)
    debug, args = _pop_flag(args, "--debug")
    if "--version" in args[:1]:
        print(f"tealightning {tealightning.__version__}")
        return
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        given = list(args)
        plugins, args = _pop_values(args, "--import")
        for plugin in plugins:
            import_plugin(plugin)
        _run(args[0], args[1:], given)
    except _user_errors() as error:
        told = None if debug else _told_to_the_user(error)
        if told is None:
            raise
        hint = "\n(--debug shows the traceback)" if told.__cause__ is not None else ""
        words = " ".join([str(told), *getattr(told, "__notes__", ())])  # a note says in which phase it happened
        print(f"tealightning: error: {' '.join(words.split())}{hint}", file=sys.stderr)
        raise SystemExit(getattr(told, "exit_code", 2)) from error


def _run(command: str, args: list[str], given: list[str]) -> None:
    quiet_startup()
    if command == "playground":
        from tealightning.cli.commands import playground

        playground(args)
    elif command == "quickstart":
        from tealightning.cli.quickstart import quickstart

        quickstart(args)
    elif command == "estimators":
        from tealightning.cli.commands import estimators

        estimators(args)
    elif command == "compare":
        from tealightning.cli.compare import compare

        compare(args)
    elif command == "diagnose":
        from tealightning.cli.diagnose_gradients import diagnose

        diagnose(args)
    else:
        from tealightning.cli.training import run_training

        run_training(command, args, given)


def _user_errors() -> tuple[type[Exception], ...]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException)


def _told_to_the_user(error: BaseException) -> BaseException | None:
    """`error`, or the one it wraps, that was raised on purpose: by this package, or by Lightning's and the parser's
    checks of settings, or for a missing file; None for a defect."""
    from tealightning.cli.error_location import SettingError

    if isinstance(error, SettingError):
        return error
    chain = [error]
    while (wrapped := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(wrapped)
    is_parsers = _raised_in(error).parent.name == "jsonargparse"  # it wraps what constructors raise
    for candidate in chain if is_parsers else chain[:1]:
        if _raised_in(candidate).is_relative_to(_PACKAGE):
            return candidate
    is_check = is_parsers or type(error).__name__ == "MisconfigurationException" or isinstance(error, FileNotFoundError)
    return error if is_check else None


def _raised_in(error: BaseException) -> Path:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename) if frames else Path()


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
                raise UserError(f"{option} needs a value: a Python file or a module name.")
            values.append(value)
        elif arg.startswith(f"{option}="):
            values.append(arg.removeprefix(f"{option}="))
        else:
            rest.append(arg)
    return values, rest
