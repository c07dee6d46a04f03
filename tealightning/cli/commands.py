"""Commands `playground` and `estimators`."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path


def playground(args: Sequence[str]) -> None:
    """`tealightning playground --out DIR`."""
    from tealightning.worlds import STYLE_WORLDS, build_prose, build_styles

    parser = argparse.ArgumentParser(
        prog="tealightning playground",
        description="Build a small policy, prompts and a reward, all in Hugging Face format and without a download. "
        "World prose: a reward model and text from the Python installation's own documentation (a few minutes on 2 "
        "cores). Worlds styles and styles-budget: mean and best-of-N disagree (half a minute).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to build; a complete one is kept as it is")
    parser.add_argument("--world", choices=["prose", *STYLE_WORLDS], default="prose", help="what is built")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    parser.add_argument("--size", choices=["default", "tiny"], default="default", help="tiny: seconds, for tests")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    options = parser.parse_args(args)
    settings = {"seed": options.seed, "size": options.size, "overwrite": options.overwrite}
    if options.world == "prose":
        build_prose(options.out, **settings)
    else:
        build_styles(options.out, world=options.world, **settings)


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
    _print_table([(name, *_describe(ESTIMATORS.get(name))) for name in ESTIMATORS.names()])


def _describe(cls: type) -> tuple[str, str, str]:
    parameters = [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(cls).parameters.items()
    ]
    return cls.__name__, getattr(cls, "objective", ""), ", ".join(parameters) or "-"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    header = ("name", "class", "objective", "parameters")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
