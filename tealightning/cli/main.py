"""Entry point: picks the command, imports plug-ins, and prints errors that the user can mend as one message.

The commands `playground` and `estimators` are here; the others have files of their own.
"""

import argparse
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import tealightning
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
    "playground": __name__,
    "estimators": __name__,
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


def quiet_startup() -> None:
    """Before anything heavy is imported: no warnings about what is done on purpose, no advertising."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Prompts are read from memory-mapped files, without worker processes; policies stay in eval mode on purpose:
    # training scores tokens exactly as sampling did.
    for message in (
        "args parameter is intended to run from within Python",
        "does not have many workers",
        r"module\(s\) in eval mode at the start of training",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)  # the same filter is added once


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def quiet_transformers() -> None:
    """No progress bars for reading and writing weights; downloads from the hub keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    were_disabled = are_progress_bars_disabled()
    disable_progress_bar()
    if not were_disabled:
        enable_progress_bars()


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


def playground(args: Sequence[str]) -> None:
    """`tealightning playground --out DIR`."""
    from tealightning.worlds import MAZE_WORLDS, WORLDS

    parser = argparse.ArgumentParser(
        prog="tealightning playground",
        description="Build a small policy, prompts and a reward, all in Hugging Face format and without a download. "
        "World maze: text mazes and a verifier, a path to the goal is rare (a minute on one core); maze-frequent: it "
        "is not. World prose: a reward model and text from the Python installation's documentation (a few minutes). "
        "Worlds styles and styles-budget: mean and best-of-N disagree (half a minute).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to build; a complete one is kept as it is")
    parser.add_argument("--world", choices=list(WORLDS), default="maze", help="what is built")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    parser.add_argument("--size", choices=["default", "tiny"], default="default", help="tiny: seconds, for tests")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    about = "what a world of mazes is made of; defaults are those of the chosen one"
    mazes = parser.add_argument_group("mazes", about, argument_default=argparse.SUPPRESS)
    mazes.add_argument("--side", type=int, help="rows and columns of the grid")
    mazes.add_argument("--wall-density", type=float, help="probability that a cell is a wall")
    about = "fewest and most moves of the shortest path"
    mazes.add_argument("--path-lengths", type=int, nargs=2, metavar=("FEWEST", "MOST"), help=about)
    about = "how often the walks that the policy learns from move towards the goal: the dial of success"
    mazes.add_argument("--greedy", type=float, help=about)
    mazes.add_argument("--illegal", type=float, help="how often they run into a wall")
    mazes.add_argument("--stop", type=float, help="how often they end before a move")
    options = vars(parser.parse_args(args))
    world, out = options.pop("world"), options.pop("out")
    settings = {name: options.pop(name) for name in ("seed", "size", "overwrite")}
    quiet_transformers()
    if options and world not in MAZE_WORLDS:
        raise UserError(f"--{next(iter(options)).replace('_', '-')} is a setting of mazes, and --world is {world}.")
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    WORLDS[world](out, **settings, **chosen)


def estimators(args: Sequence[str]) -> None:
    """`tealightning estimators [NAME]`."""
    from tealightning.estimators import ESTIMATORS

    parser = argparse.ArgumentParser(
        prog="tealightning estimators",
        description="List the advantage estimators: name, objective and parameters with their defaults; with a name, "
        "its whole documentation.",
    )
    parser.add_argument("name", nargs="?", help="show this one in full")
    options = parser.parse_args(args)
    if options.name is not None:
        cls = ESTIMATORS.get(options.name)
        print(f"{cls.__name__}{inspect.signature(cls)}\n\n{inspect.getdoc(cls)}")
        return
    rows = [("name", "class", "objective", "parameters")]
    rows += [(name, *_describe(ESTIMATORS.get(name))) for name in ESTIMATORS.names()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _describe(cls: type) -> tuple[str, str, str]:
    parameters = [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(cls).parameters.items()
    ]
    return cls.__name__, getattr(cls, "objective", ""), ", ".join(parameters) or "-"
