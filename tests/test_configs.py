"""Every YAML file in configs/ is a config that the command line accepts."""

import pytest
import yaml
from command_line import CONFIGS, QUICKSTART, resolved

from tealightning.ablation.plan import make_plan
from tealightning.ablation.spec import load_spec
from tealightning.cli.compare import resolve
from tealightning.estimators import ESTIMATORS, estimator_names

OVERLAYS = sorted(CONFIGS.glob("estimators/*.yaml"))
ABLATIONS = sorted(CONFIGS.glob("ablations/*.yaml"))
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(OVERLAYS) - set(ABLATIONS))


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("file", WHOLE, ids=lambda f: f.stem)
def test_config_parses(file, command):
    config = resolved("-c", file, command=command)
    assert config["model"]["class_path"] == "tealightning.PostTrainingModule"
    assert config["rollout"]["group_size"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("file", ABLATIONS, ids=lambda f: f.stem)
def test_ablation_resolves_every_variant(file, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    spec = load_spec(file)
    plan = make_plan(spec, resolve)
    assert len(plan.jobs) == len(plan.variants) * len(spec.seeds)
    for (name, seed), job in plan.jobs.items():
        assert job.config["seed_everything"] == seed, name
        assert job.config["model"]["init_args"]["ns"] == spec.evaluation.ns


def test_every_registered_estimator_has_an_overlay_of_its_name():
    assert [file.stem for file in OVERLAYS] == estimator_names()


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda f: f.stem)
def test_overlay_sets_its_estimator_and_nothing_else(file):
    base, config = resolved("-c", QUICKSTART), resolved("-c", QUICKSTART, "-c", file)
    estimator = config["model"]["init_args"].pop("estimator")
    del base["model"]["init_args"]["estimator"]
    assert config == base
    assert estimator["class_path"].rpartition(".")[2] == ESTIMATORS.get(file.stem).__name__
    written = yaml.safe_load(file.read_text())["model"]["init_args"]["estimator"].get("init_args", {})
    assert estimator.get("init_args", {}) == written  # every parameter is in the file, to be edited there


def test_quickstart_is_the_documented_default():
    config = resolved("-c", QUICKSTART)
    estimator = config["model"]["init_args"]["estimator"]
    assert estimator["class_path"] == "tealightning.estimators.OptimalTEA"
    assert (config["rollout"]["group_size"], estimator["init_args"]["target_n"]) == (16, 128)
    assert max(config["model"]["init_args"]["ns"]) == 128
    assert config["rollout"]["engine"]["class_path"] == "tealightning.rollouts.VLLMEngine"
    assert config["rollout"]["reward"]["class_path"] == "tealightning.worlds.MazeReward"
