"""Commands `playground` and `estimators`."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from tealightning.cli.console import quiet_transformers
from tealightning.errors import UserError


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
    from tealightning.estimators import ESTIMATORS, AdvantageEstimator

    parser = argparse.ArgumentParser(
        prog="tealightning estimators",
        description="List the advantage estimators: name, objective and parameters with their defaults; with a name, "
        "its whole documentation.",
    )
    parser.add_argument("name", nargs="?", help="show this one in full")
    options = parser.parse_args(args)
    if options.name is not None:
        cls = ESTIMATORS.get(options.name)
        print(f"{cls.__name__}{inspect.signature(cls)}")
        for each in cls.__mro__[: cls.__mro__.index(AdvantageEstimator)]:  # a base describes arguments of its family
            if each.__doc__:
                print(f"\n{inspect.cleandoc(each.__doc__)}")
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
