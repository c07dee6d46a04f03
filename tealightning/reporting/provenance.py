"""Provenance of a figure: the command, the commit, the seed and the versions behind it."""

import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tealightning.version import __version__

_PACKAGES = ("torch", "numpy", "scipy")


def provenance(args: Sequence[str], *, seed: int) -> dict[str, str]:
    """What is needed to make a figure again.

    Args:
        args: The command line without the program: `["diagnose", "gradients", "-m", "16"]`.
        seed: What all random numbers follow from.

    Returns:
        {"command", "commit", "seed", "versions"}, all text.
    """
    packages = [f"{name} {version(name)}" for name in _PACKAGES]
    return {
        "command": shlex.join(["tealightning", *args]),
        "commit": commit(),
        "seed": str(seed),
        "versions": ", ".join([f"tealightning {__version__}", f"Python {platform.python_version()}", *packages]),
    }


def commit() -> str:
    """The short hash of the checkout that this package runs from, with `-dirty` for uncommitted changes to it; "not a
    checkout" for an installed package."""
    folder = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() if described.returncode == 0 else "not a checkout"


def provenance_lines(values: dict[str, str]) -> str:
    """The same as a markdown list, the command in a code block first."""
    rest = "\n".join(f"- {name}: {value}" for name, value in values.items() if name != "command")
    return f"```\n{values['command']}\n```\n\n{rest}"
