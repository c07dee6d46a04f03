"""Executes docs/how-to/add-a-health-check.md."""

import re
from pathlib import Path

import pytest
from playground_fits import fit

from tealightning import HealthChecks, SamplingConfig, UnhealthyRun
from tealightning.callbacks.health_checks import HEALTH_CHECKS
from tealightning.cli.main import import_plugin

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-health-check.md").read_text(encoding="utf-8")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The page's file, imported as `--import` does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    known = dict(HEALTH_CHECKS)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_truncation_check.py").write_text(code)
    import_plugin(str(tmp_path / "my_truncation_check.py"))
    yield
    HEALTH_CHECKS.clear()
    HEALTH_CHECKS.update(known)


def test_check_of_the_page_warns_or_stops_and_is_counted(plugin, playground):
    short = {"sampling": SamplingConfig(max_new_tokens=2)}
    with pytest.warns(
        UserWarning, match=r"% of the completions are cut off \(limit 50%\).*\(Health check truncation.\)"
    ):
        _, record = fit(playground, steps=4, callbacks=[HealthChecks()], rollout=short)
    assert record.series("train/health_truncation") == [1, 2, 3, 4]
    stopping = HealthChecks(stop_on=["truncation"])
    with pytest.raises(UnhealthyRun, match=r"after optimizer step 2: .*are cut off .*at 3 steps in a row"):
        fit(playground, steps=4, callbacks=[stopping], rollout=short)
    assert stopping.counts["truncation"] == 3
    assert HEALTH_CHECKS["truncation"].total == 0  # every run counts in a copy of its own
