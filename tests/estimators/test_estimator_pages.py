"""Every estimator has a page and an overlay, and both fit its constructor."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from tealightning.estimators import ESTIMATORS, AdvantageEstimator, build_estimator, estimator_names

ROOT = Path(__file__).parents[2]
NAMES = [name for name in estimator_names() if ESTIMATORS.get(name).__module__.startswith("tealightning.")]


def instantiate(section: dict) -> AdvantageEstimator:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--estimator", type=AdvantageEstimator)
    config = parser.parse_object({"estimator": section["model"]["init_args"]["estimator"]})
    return parser.instantiate_classes(config).estimator


@pytest.mark.parametrize("name", NAMES)
def test_overlay_builds_the_estimator_with_its_defaults(name):
    text = (ROOT / "configs" / "estimators" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert repr(instantiate(yaml.safe_load(text))) == repr(build_estimator(name))


@pytest.mark.parametrize("name", NAMES)
def test_page_documents_every_parameter_with_its_default_and_a_working_snippet(name):
    page = (ROOT / "docs" / "estimators" / f"{name}.md").read_text()
    for parameter in inspect.signature(ESTIMATORS.get(name)).parameters.values():
        default = "null" if parameter.default is None else str(parameter.default)
        row = re.search(rf"^\| `{parameter.name}` \| `(\S+)` \|", page, re.MULTILINE)
        assert row is not None, f"{name}.md has no row for {parameter.name}"
        assert row[1] == default or float(row[1]) == parameter.default
    snippet = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert snippet is not None
    assert instantiate(yaml.safe_load(snippet[1])).name == name


def test_index_lists_every_estimator():
    index = (ROOT / "docs" / "estimators" / "index.md").read_text()
    for name in NAMES:
        assert f"| [`{name}`]({name}.md) |" in index
