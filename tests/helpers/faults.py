"""Faults that tests inject, counted: `make test-faults` writes them down, and docs/reliability.md is made from that.

    @pytest.mark.fault("SIGKILL while a checkpoint is written", how="os.kill at a random moment of the write")
    def test_kill_during_a_checkpoint(injected):
        ...
        injected(times=20, lost="nothing")

What was lost is what the test has asserted. A test with the marker that passes without saying so fails.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Injected = Callable[..., None]
OPTION = "--fault-report"


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Iterator[Injected]:
    """Say, once a test's assertions hold: how many faults it injected and what was lost."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "`injected` belongs to tests with the marker `fault`"
    said: list[dict[str, Any]] = []

    def say(*, times: int, lost: str = "nothing") -> None:
        assert times > 0
        said.append({"times": times, "lost": lost})

    yield say
    report = getattr(request.node, "call_report", None)
    if report is not None and report.passed:
        assert said, "the test passed without saying what it injected"
        _write(request, _description(*marker.args, **marker.kwargs), said)


def _description(fault: str, *, how: str) -> dict[str, str]:
    return {"fault": fault, "how": how}


def _write(request: pytest.FixtureRequest, description: dict[str, str], said: list[dict[str, Any]]) -> None:
    file = request.config.getoption(OPTION)
    if file is None:
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lines:
        for one in said:
            lines.write(json.dumps(description | one | {"test": request.node.nodeid}) + "\n")
