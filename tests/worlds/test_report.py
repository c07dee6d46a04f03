"""The report prints what each world's manifest has, and nothing that it lacks."""

import json
from pathlib import Path
from typing import Any

import pytest

from tealightning.worlds import report

COMMON = {"format_version": 1, "policy_parameters": 1234, "prompts": {"train": 40, "val": 8, "test": 9}}

MAZE = {"mean_score": 0.0412, "arrived_share": 0.0107, "zero_share": 0.767, "best_of_n": {"1": 0.041, "4": 0.131}}
MAZE_TABLES = """\
| figure | value |
| --- | --- |
| policy, parameters | 1,234 |
| prompts train / val / test | 40 / 8 / 9 |
| mean score | 0.041 |
| paths that arrive | 1.1% |
| paths that score 0 | 76.7% |
| build, seconds | 58 |

| n | 1 | 4 |
| --- | --- | --- |
| best of n | 0.04 | 0.13 |
"""

STYLES = {
    "daring_share": 0.204,
    "failure_share": 0.0,
    "distinct_share": 1.0,
    "best_of_n": {"1": -0.19, "16": 1.951},
    "best_of_n_of_this_share": {"1": -0.204, "16": 1.958},
}
STYLES_TABLES = """\
| figure | value |
| --- | --- |
| policy, parameters | 1,234 |
| prompts train / val / test | 40 / 8 / 9 |
| daring dishes | 20.4% |
| completions that are no dish | 0.0% |
| different dishes among a prompt's | 100.0% |
| build, seconds | 58 |

| n | 1 | 16 |
| --- | --- | --- |
| best of n | -0.19 | 1.95 |
| expected of this share of daring dishes | -0.20 | 1.96 |
"""


@pytest.mark.parametrize(("figures", "tables"), [(MAZE, MAZE_TABLES), (STYLES, STYLES_TABLES)], ids=["maze", "styles"])
def test_report_prints_the_figures_of_a_world_without_a_reward_model(
    figures: dict[str, Any], tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = COMMON | {"figures": figures, "build_seconds": 58.05}
    (tmp_path / "playground.json").write_text(json.dumps(manifest))
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == tables
