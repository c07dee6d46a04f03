"""The command line: `tealightning fit | validate | test | playground | estimators`."""

from tealightning.cli.main import main

__all__ = ["main"]
