"""Fixtures for the whole suite."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import OPTION, injected  # noqa: F401 - a fixture

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a script, and inherited by processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny playground (policy, reward_model, prompts), built once a session; do not write to it."""
    from tealightning.worlds import build_prose

    return build_prose(tmp_path_factory.mktemp("playground") / "tiny", size="tiny", progress=False).path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, help="append the injected faults to this file, a JSON object a line")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("fault") and "injected" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(
                f"{item.nodeid} has the marker `fault` and must say what it injected: see faults.py"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.call_report = report  # for `injected`
    return report
