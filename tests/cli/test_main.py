import logging
import subprocess
import sys

import pytest
from command_line import run

import tealightning
from tealightning.cli.console import quiet_startup
from tealightning.estimators import ESTIMATORS, estimator_names


def test_version_of_the_module_run_as_a_program():
    command = [sys.executable, "-m", "tealightning", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout == f"tealightning {tealightning.__version__}\n"
    assert finished.stderr == ""


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(args):
    result = run(*args)
    assert result.status == 0
    for command in ("quickstart", "fit", "validate", "test", "playground", "compare", "estimators", "diagnose"):
        assert f"\n  {command} " in result.out


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_of_a_command_says_how_to_get_help_of_a_class(command):
    result = run(command, "--help")
    assert result.status == 0
    assert result.out.startswith(f"usage: tealightning {command} [-c CONFIG]")
    beginning = " ".join(result.out[:1000].split())
    for option in ("--model.help", "--data.help", "--model.estimator.help tea", "--rollout.engine.help vllm_engine"):
        assert option in beginning
    assert "--rollout.group_size" in result.out


@pytest.mark.parametrize(
    ("args", "parameter"),
    [
        (["--model.help"], "--model.gradient_clip_norm"),
        (["--data.help"], "--data.max_prompt_tokens"),
        (["--model.help", "PostTrainingModule"], "--model.inner_epochs"),
        (["--model.estimator.help", "tea"], "estimator.target_n"),
        (["--model.estimator.help=TEA"], "estimator.target_n"),
        (["--model.init_args.estimator.help", "PrefixTEA"], "estimator.num_prefixes"),
        (["--model.optimizer.help", "AdamW"], "optimizer.weight_decay"),
        (["--rollout.engine.help", "vllm_engine"], "--rollout.engine.kv_cache_gib"),
        (["--rollout.reward.help", "FunctionReward"], "--rollout.reward.function"),
        (["--rollout.sampling.help"], "--rollout.sampling.temperature"),
    ],
)
def test_help_of_a_class_lists_its_arguments(args, parameter):
    result = run("fit", *args)
    assert result.status == 0, result.err
    assert parameter in result.out


def test_estimators_lists_each_with_its_defaults():
    result = run("estimators")
    header, *lines = result.out.splitlines()
    assert header.split() == ["name", "class", "objective", "parameters"]
    assert [line.split()[0] for line in lines] == estimator_names()
    tea = next(line for line in lines if line.startswith("tea "))
    assert "TEA" in tea and "target_n=128, alpha=0.25" in tea
    assert ESTIMATORS.get("tea").objective in tea


def test_estimators_with_a_name_shows_its_documentation():
    result = run("estimators", "tea")
    assert result.out.startswith("TEA(*, target_n: int = 128")
    assert "Upper-tail level" in result.out


def test_playground_builds_once_and_is_reused(tmp_path):
    folder = tmp_path / "playground"
    assert run("playground", "--world", "prose", "--size", "tiny", "--out", folder).status == 0
    weights = folder / "policy" / "model.safetensors"
    built = weights.stat().st_mtime_ns
    again = run("playground", "--world", "prose", "--size", "tiny", "--out", folder)
    assert again.status == 0 and "Reusing" in again.out + again.err
    assert weights.stat().st_mtime_ns == built


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["fti"],
            "Unknown command 'fti'. Did you mean 'fit'? Valid: compare, diagnose, estimators, fit, playground, "
            "quickstart, test, validate.",
        ),
        (["estimators", "tae"], "Unknown estimator 'tae'. Did you mean 'tea'?"),
        (["playground"], "--out"),
        (["playground", "--out", "x", "--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_wrong_command_is_one_message(args, told):
    result = run(*args)
    assert result.status == 2
    assert told in result.err and "Traceback" not in result.err


def test_advertisements_are_dropped_and_all_else_is_kept(caplog):
    quiet_startup()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("💡 Tip: For seamless cloud logging, try installing another product")
        logger.info("`Trainer.fit` stopped: `max_steps=%d` reached.", 3)
    assert [record.getMessage() for record in caplog.records] == ["`Trainer.fit` stopped: `max_steps=3` reached."]


def test_argument_that_is_no_utf8_is_refused_before_it_is_saved():
    result = run("fit", "--data.system_prompt=caf\udce9")  # as Python reads the byte 0xe9
    assert result.status == 2
    assert r"the command line holds half a character" in result.err and r"caf\udce9" in result.err
