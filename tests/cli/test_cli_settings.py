"""Overrides, overlays and plug-ins: what the command line resolves to."""

import importlib
import inspect
import sys

import pytest
import torch
import yaml
from command_line import CONFIGS, PROSE, overlay, resolved, run
from run_records import quickstart_args

from tealightning.cli.user_settings import canonical_args
from tealightning.estimators import ESTIMATORS, estimator_names


def estimator_of(config):
    return config["model"]["init_args"]["estimator"]


@pytest.mark.parametrize("name", ["TEA", "tea", "tealightning.estimators.TEA"])
@pytest.mark.parametrize("key", ["model.estimator", "model.init_args.estimator"])
def test_an_estimator_by_class_name_registered_name_and_path(name, key):
    config = resolved("-c", PROSE, f"--{key}={name}", f"--{key}.target_n=64")
    assert estimator_of(config)["class_path"].rpartition(".")[2] == "TEA"
    assert estimator_of(config)["init_args"]["target_n"] == 64


@pytest.mark.parametrize("name", estimator_names())
def test_every_registered_estimator_by_name(name):
    config = resolved("-c", PROSE, f"--model.estimator={name}")
    assert estimator_of(config)["class_path"].rpartition(".")[2] == ESTIMATORS.get(name).__name__


def test_an_option_in_two_words():
    assert estimator_of(resolved("-c", PROSE, "--model.estimator", "grpo"))["init_args"] == {"eps": 1e-4}


@pytest.mark.parametrize(
    "estimator",
    ["prefix_tea", {"class_path": "prefix_tea"}, {"class_path": "PrefixTEA", "init_args": {"rotations": 4}}],
)
def test_registered_names_in_yaml(tmp_path, estimator):
    file = overlay(tmp_path, {"model": {"init_args": {"estimator": estimator}}})
    assert estimator_of(resolved("-c", PROSE, "-c", file))["class_path"].endswith(".PrefixTEA")


def test_registered_names_inside_a_weighted_reward(tmp_path):
    parts = {"root": {"class_path": "function_reward", "init_args": {"function": "math:sqrt"}}}
    reward = {"class_path": "weighted_reward", "init_args": {"rewards": parts, "weights": {"root": 2.0}}}
    config = resolved("-c", PROSE, "-c", overlay(tmp_path, {"rollout": {"reward": reward}}))
    inner = config["rollout"]["reward"]["init_args"]
    assert inner["rewards"]["root"]["class_path"].endswith(".FunctionReward")
    assert inner["weights"] == {"root": 2.0}


def test_numbers_survive_the_renaming_of_a_file(tmp_path):
    """Files with names in them are written anew: 1e-3, which YAML 1.1 reads as text, stays the number."""
    file = overlay(tmp_path, "model: {init_args: {estimator: grpo, optimizer: {init_args: {lr: 1e-3}}, ns: [1, 2]}}")
    config = resolved("-c", PROSE, "-c", file)["model"]["init_args"]
    assert config["optimizer"]["init_args"]["lr"] == 0.001
    assert config["ns"] == [1, 2]


def test_an_empty_overlay_changes_nothing(tmp_path):
    file = overlay(tmp_path, "# nothing yet\n")
    assert resolved("-c", PROSE, "-c", file) == resolved("-c", PROSE)


def test_engine_and_reward():
    config = resolved("-c", PROSE, "--rollout.engine=TransformersEngine", "--rollout.engine.batch_size=3")
    assert config["rollout"]["engine"]["class_path"].endswith(".TransformersEngine")
    assert config["rollout"]["engine"]["init_args"] == {"batch_size": 3}
    config = resolved("-c", PROSE, "--rollout.reward=FunctionReward", "--rollout.reward.function=math:sqrt")
    assert config["rollout"]["reward"]["init_args"]["function"] == "math:sqrt"


def test_health_checks_are_always_on_and_have_a_section(tmp_path):
    assert resolved("-c", PROSE)["health"]["max_log_prob_diff"] == 0.2
    file = overlay(tmp_path, {"health": {"stop_on": ["nonfinite", "kl"], "max_reward_ties": None}})
    health = resolved("-c", PROSE, "-c", file, "--health.max_kl=3")["health"]
    assert (health["stop_on"], health["max_reward_ties"], health["max_kl"]) == (["nonfinite", "kl"], None, 3.0)


def test_optimizer_and_scheduler():
    config = resolved(
        *("-c", PROSE, "--model.optimizer=SGD", "--model.optimizer.lr=0.1"),
        *("--model.lr_scheduler=LinearLR", "--model.lr_scheduler.total_iters=7"),
    )["model"]["init_args"]
    assert config["optimizer"]["class_path"].endswith(".SGD")
    assert config["optimizer"]["init_args"]["lr"] == 0.1
    assert config["lr_scheduler"]["init_args"]["total_iters"] == 7


def test_a_later_file_or_option_wins():
    config = resolved(
        *("-c", PROSE, "-c", CONFIGS / "estimators" / "prefix_tea.yaml"),
        *("--model.estimator.num_prefixes=2", "--model.loss.kl_coef=0", "--rollout.sampling.temperature=0.7"),
        *("--trainer.callbacks+=SampleTable", "--trainer.callbacks.every_n_steps=5"),
    )
    assert estimator_of(config)["init_args"]["num_prefixes"] == 2
    assert config["model"]["init_args"]["loss"]["kl_coef"] == 0.0
    assert config["rollout"]["sampling"]["temperature"] == 0.7
    assert config["rollout"]["sampling"]["max_new_tokens"] == 32
    assert config["trainer"]["callbacks"][-1]["init_args"]["every_n_steps"] == 5


PLUGIN = """
from torch import Tensor

from tealightning.estimators import AdvantageEstimator, register


@register
class Winner{name}(AdvantageEstimator):
    '''The best rollout alone.'''

    def __init__(self, *, height: float = 1.0) -> None:
        self.height = height

    def compute(self, rewards: Tensor) -> Tensor:
        return self.height * (rewards == rewards.amax(dim=1, keepdim=True)).double()
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A file with an estimator; import it as you like, nothing of it stays."""
    monkeypatch.setattr(ESTIMATORS, "_classes", dict(ESTIMATORS._classes))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, registered=True):
        text = PLUGIN.format(name=name)
        file = tmp_path / f"own_{name.lower()}.py"
        file.write_text(text if registered else text.replace("@register\n", ""), encoding="utf-8")
        return file

    yield write
    for module in [m for m in sys.modules if m.startswith("own_")]:
        del sys.modules[module]


def test_a_class_from_the_python_path(own_file, monkeypatch):
    file = own_file("Path", registered=False)
    monkeypatch.syspath_prepend(file.parent)
    config = resolved("-c", PROSE, "--model.estimator=own_path.WinnerPath", "--model.estimator.height=2")
    assert estimator_of(config) == {"class_path": "own_path.WinnerPath", "init_args": {"height": 2.0}}


def test_a_registered_class_from_an_imported_file(own_file, tmp_path):
    file = own_file("Import")
    args = ["--import", file, "-c", PROSE]
    config = resolved(*args, "--model.estimator=winner_import", "--model.estimator.height=3")
    assert estimator_of(config) == {"class_path": "own_import.WinnerImport", "init_args": {"height": 3.0}}
    in_yaml = overlay(tmp_path, {"model": {"init_args": {"estimator": "winner_import"}}})
    assert estimator_of(resolved(*args, "-c", in_yaml))["class_path"] == "own_import.WinnerImport"
    assert "winner_import" in run("estimators", f"--import={file}").out


def test_an_imported_estimator_trains_and_the_saved_config_runs_again(own_file, playground, tmp_path):
    file = own_file("Train")
    args = quickstart_args("fit", playground, tmp_path)
    options = ["--model.estimator=winner_train", "--rollout.engine=transformers_engine", "--model.estimator.height=2"]
    result = run(*args, "--import", file, *options)
    assert result.status == 0, result.err
    saved = tmp_path / "config.yaml"
    assert estimator_of(yaml.safe_load(saved.read_text()))["class_path"] == "own_train.WinnerTrain"
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3  # the header and two steps
    again = resolved("--import", file, "-c", saved)
    assert again == resolved("--import", file, *args[1:], *options)


def test_a_folder_is_not_used_for_two_runs(playground, tmp_path):
    args = [*quickstart_args("fit", playground, tmp_path), "--rollout.engine=transformers_engine"]
    (tmp_path / "config.yaml").write_text("of another run")
    result = run(*args)
    assert result.status == 2
    assert f"{tmp_path}/config.yaml is another run's" in result.err
    assert (tmp_path / "config.yaml").read_text() == "of another run"


BRIDGE = {"target_n": 64, "alpha": 1.0, "scale": "group_std", "scale_weight": 0.5}


def test_another_estimator_has_its_own_defaults_and_the_target_that_was_set(tmp_path):
    """`alpha` and `scale` of the estimator before would be settings of a comparison that nobody wrote."""
    base = overlay(
        tmp_path, {"model": {"init_args": {"estimator": {"class_path": "optimal_tea", "init_args": BRIDGE}}}}
    )
    there = ["-c", PROSE, "-c", base]
    defaults = estimator_of(resolved("-c", PROSE, "--model.estimator=max_at_k"))["init_args"]
    assert estimator_of(resolved(*there, "--model.estimator=max_at_k"))["init_args"] == defaults
    prefix = estimator_of(resolved(*there, "--model.estimator=PrefixTEA"))["init_args"]
    assert (prefix["target_n"], prefix["alpha"]) == (64, 0.25)
    own = estimator_of(resolved(*there, "--model.estimator", "tea", "--model.estimator.alpha=0.5"))["init_args"]
    assert (own["target_n"], own["alpha"], own["scale"]) == (64, 0.5, "reward_std")
    same = estimator_of(resolved(*there, "--model.estimator=OptimalTEA", "--model.estimator.lam=1.0"))["init_args"]
    assert same == {**BRIDGE, "lam": 1.0}


@pytest.mark.parametrize("name", ["max_at_k", "tea"])
def test_an_overlay_of_another_estimator_resets_too(tmp_path, name):
    base = {"model": {"init_args": {"estimator": {"class_path": "optimal_tea", "init_args": BRIDGE}}}}
    over = ["-c", str(CONFIGS / "estimators" / f"{name}.yaml")]
    alone = estimator_of(resolved("-c", PROSE, "--model.estimator.target_n=64", *over))
    assert estimator_of(resolved("-c", PROSE, "-c", overlay(tmp_path, base), *over)) == alone


def optimizer_of(*args):
    init = resolved("-c", PROSE, *args)["model"]["init_args"]
    return init["optimizer"], init["lr_scheduler"]


def test_another_optimizer_keeps_the_arguments_that_it_has_too():
    adamw = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.25", "--model.optimizer.betas=[0.5,0.6]")
    sgd, _ = optimizer_of(*adamw, "--model.optimizer=SGD")
    assert sgd["class_path"] == "torch.optim.SGD"
    assert sgd["init_args"]["lr"] == 0.25 and "betas" not in sgd["init_args"]
    again, _ = optimizer_of(*adamw, "--model.optimizer=SGD", "--model.optimizer.lr=0.5", "--model.optimizer=Adam")
    assert again["init_args"]["lr"] == 0.5 and again["init_args"]["betas"] == [0.9, 0.999]


def test_every_optimizer_and_schedule_of_torch_by_its_name():
    """Also after transformers, which has an Adafactor of its own, was imported."""
    importlib.import_module("transformers.optimization")
    assert optimizer_of("--model.optimizer=Adafactor")[0]["class_path"] == "torch.optim.Adafactor"
    for key, module in (("optimizer", torch.optim), ("lr_scheduler", torch.optim.lr_scheduler)):
        for name in {n for n in module.__all__ if inspect.isclass(getattr(module, n))} - {"ReduceLROnPlateau"}:
            assert canonical_args([f"--model.{key}={name}"]) == [f"--model.{key}={module.__name__}.{name}"]


def test_muon_with_adamw_by_name():
    muon, _ = optimizer_of("--model.optimizer=MuonWithAdamW", "--model.optimizer.adamw_lr=0.1")
    assert muon["class_path"] == "tealightning.training.optimizers.MuonWithAdamW"
    assert muon["init_args"]["adamw_lr"] == 0.1


def test_a_schedule_of_transformers_by_its_name(tmp_path):
    options = ("--model.lr_scheduler=cosine", "--model.lr_scheduler.warmup_steps=3")
    bare = overlay(tmp_path, "model: {init_args: {lr_scheduler: cosine}}", "bare.yaml")
    path = overlay(
        tmp_path,
        "model: {init_args: {lr_scheduler: {class_path: cosine, init_args: {warmup_steps: 3}}}}",
        "path.yaml",
    )
    in_two_words = ("--model.lr_scheduler", "cosine", "--model.lr_scheduler.warmup_steps", "3")
    for args in (options, in_two_words, ("-c", path), ("-c", bare, options[1])):
        _, schedule = optimizer_of(*args)
        assert schedule["class_path"] == "tealightning.training.schedules.WarmupSchedule"
        assert (schedule["init_args"]["name"], schedule["init_args"]["warmup_steps"]) == ("cosine", 3)


@pytest.mark.parametrize("path", ["", "torch.optim.lr_scheduler.", "lightning.pytorch.cli."])
def test_reduce_on_plateau_takes_a_monitor(tmp_path, path):
    for args in (
        (
            f"--model.lr_scheduler={path}ReduceLROnPlateau",
            "--model.lr_scheduler.monitor=x",
            "--model.lr_scheduler.mode=max",
        ),
        (
            "-c",
            overlay(
                tmp_path,
                f"model: {{init_args: {{lr_scheduler: {{class_path: {path}ReduceLROnPlateau, "
                "init_args: {monitor: x, mode: max}}}}",
            ),
        ),
    ):
        _, plateau = optimizer_of(*args)
        assert plateau["class_path"] == "lightning.pytorch.cli.ReduceLROnPlateau"
        assert (plateau["init_args"]["monitor"], plateau["init_args"]["mode"]) == ("x", "max")
