"""Fixtures for the whole suite."""

import signal
from pathlib import Path

import pytest

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a script, and inherited by processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny playground (policy, reward_model, prompts), built once a session; do not write to it."""
    from tealightning.playground import build_playground

    return build_playground(tmp_path_factory.mktemp("playground") / "tiny", size="tiny", progress=False).path
