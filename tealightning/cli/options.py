"""Parser and option types of the `diagnose` commands."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_least(low: int, why: str = "") -> Callable[[str], int]:
    """Type of an option: a whole number that is not below `low`."""

    def parse(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}{why}, got {text}")
        return int(text)

    parse.__name__ = "int"  # in argparse's message on what is no number
    return parse


def upper_share(text: str) -> float:
    """Type of an option: a share in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return float(text)


def new_parser(command: str, out: str, **texts: Any) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of its texts, takes whole option names only, and has --seed and --out."""
    prog, layout = f"tealightning diagnose {command}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, formatter_class=layout, allow_abbrev=False, **texts)
    seed_help = "all random numbers but those of a config's rollouts follow from it (default: 0)"
    parser.add_argument("--seed", type=at_least(0), default=0, help=seed_help)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for the report (default: {out})")
    return parser
