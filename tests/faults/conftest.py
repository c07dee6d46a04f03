"""Fixtures of the fault tests that start whole runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Fit, fits, left_in_shared_memory, soon
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture
def fit(zygote: Zygote, playground: Path, tmp_path: Path) -> Iterator[Fit]:
    """Starts runs that write to `tmp_path`, and leave nothing in shared memory."""
    before = left_in_shared_memory()
    yield fits(zygote, playground, tmp_path)
    soon(lambda: not left_in_shared_memory() - before)
