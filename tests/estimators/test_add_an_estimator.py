"""Executes docs/how-to/add-an-estimator.md."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from tealightning.estimators import ESTIMATORS, AdvantageEstimator, build_estimator, estimator_names

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-an-estimator.md").read_text()
REWARDS = torch.tensor([[3.0, 1.0, 2.0, 2.0]], dtype=torch.float64)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(ESTIMATORS, "_classes", dict(ESTIMATORS._classes))


def test_route_a_runs_a_class_of_the_users_own_file_without_registration(tmp_path, monkeypatch):
    (tmp_path / "my_estimators.py").write_text(blocks("python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_estimators", raising=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--estimator", type=AdvantageEstimator)
    section = yaml.safe_load(blocks("yaml")[0])["model"]["init_args"]["estimator"]
    estimator = parser.instantiate_classes(parser.parse_object({"estimator": section})).estimator
    sys.modules.pop("my_estimators")

    assert estimator.beta == 2.0
    assert "exponential_tilt" not in estimator_names()
    e = torch.tensor([6.0, 2.0, 4.0, 4.0], dtype=torch.float64).exp()
    torch.testing.assert_close(estimator(REWARDS), ((4 * e / e.sum() - 1) / 2)[None])
    assert estimator(torch.full((1, 49), 0.1)).count_nonzero() == 0


def test_route_b_registers_under_the_snake_case_name(capsys):
    exec(compile(blocks("python")[1], "add-an-estimator.md", "exec"), {"__name__": "my_module"})
    assert "sign_rank" in estimator_names()
    assert build_estimator("sign_rank")(REWARDS).tolist() == [[0.75, -0.75, 0.0, 0.0]]
    printed = re.search(r"\[\[.*?\]\]", capsys.readouterr().out)
    promised = re.search(r"# (\[\[.*?\]\])", blocks("python")[1])
    assert yaml.safe_load(printed[0]) == yaml.safe_load(promised[1])
