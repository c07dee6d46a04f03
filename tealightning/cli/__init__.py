"""Command line: `tealightning quickstart | fit | validate | test | playground | compare | estimators | diagnose`."""

from tealightning.cli.main import main

__all__ = ["main"]
