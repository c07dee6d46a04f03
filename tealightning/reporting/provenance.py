"""Provenance of a figure: the command, the commit, the seed and the versions behind it."""

import contextlib
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tealightning.version import __version__


def provenance(args: Sequence[str], *, seed: int) -> dict[str, str]:
    """What is needed to make a figure again, as text: "command" (`args` without the program), "commit", "seed" and
    "versions"."""
    packages = package_versions("torch", "numpy", "scipy")
    versions = {"tealightning": __version__, "Python": packages.pop("python")} | packages
    return {
        "command": shlex.join(["tealightning", *args]),
        "commit": commit(),
        "seed": str(seed),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def commit() -> str:
    """The short hash of the checkout that this package runs from, with `-dirty` for uncommitted changes to it; "not a
    checkout" for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() if described.returncode == 0 else "not a checkout"


def provenance_lines(values: dict[str, str]) -> str:
    """`provenance` as a markdown list, the command in a code block first."""
    rest = "\n".join(f"- {name}: {value}" for name, value in values.items() if name != "command")
    return f"```\n{values['command']}\n```\n\n{rest}"
