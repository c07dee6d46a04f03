"""What goes wrong is told in one message that names the setting and the nearest valid name; the status is 2."""

import pickle
import sys

import pytest
from command_line import PROSE, QUICKSTART, overlay, run
from run_records import quickstart_args

from tealightning.cli import commands, training
from tealightning.errors import MissingFileError, UserError
from tealightning.estimators import ESTIMATORS


def refused(*args):
    result = run(*args)
    assert result.status == 2
    assert "\ntealightning: error: " in f"\n{result.err}"  # behind what Lightning has logged by then
    for noise in ("Traceback", "Namespace(", "<class", "typing.", "Union subtypes"):
        assert noise not in result.err
    return result.err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("model.estimator=TAE", "Unknown estimator 'TAE'. Did you mean 'tea'? Valid: bon_max_mean, calibrated_tea"),
        ("rollout.engine=VLMEngine", "Unknown engine 'VLMEngine'. Did you mean 'vllm_engine'"),
        ("rollout.reward=FunctonReward", "Unknown reward 'FunctonReward'. Did you mean 'function_reward'"),
        ("model.lr_scheduler=cosin", "model.lr_scheduler: there is no class 'cosin'. Did you mean 'cosine'"),
        ("model.optimizer=SGDD", "model.optimizer: there is no class 'SGDD'. Did you mean 'SGD'"),
        ("trainer.logger=CVSLogger", "trainer.logger: there is no class 'CVSLogger'. Did you mean 'CSVLogger'"),
        ("trainer.callbacks+=SampleTabel", "there is no class 'SampleTabel'. Did you mean 'SampleTable'?"),
        ("model.estimator=own_file.Mine", "(No module named 'own_file'). Is its folder on PYTHONPATH? `--import path"),
        ("model.estimator=tealightning.estimators.TAE", "has no attribute 'TAE'). Did you mean 'TEA'?"),
        ("model.estimator=torch.nn.Linear", "model.estimator: torch.nn.Linear is no AdvantageEstimator."),
        ("rollout.reward.function=math:sqrt", "Unknown setting 'rollout.reward.function'."),
    ],
)
def test_unknown_class(option, told):
    assert told in refused("fit", "-c", PROSE, f"--{option}")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("modle.policy=x", "Unknown setting 'modle'. Did you mean 'model'? Valid: checkpoint, ckpt_path, data"),
        ("model.polcy=x", "Unknown setting 'model.polcy'. Did you mean 'policy'?"),
        (
            "model.estimator.target=3",
            "Unknown setting 'model.estimator.target'. Did you mean 'target_n'? Valid: alpha,",
        ),
        ("model.loss.kl_coeff=3", "Unknown setting 'model.loss.kl_coeff'. Did you mean 'kl_coef'?"),
        ("model.optimizer.learning_rate=3", "Unknown setting 'model.optimizer.learning_rate'. Valid: amsgrad, betas"),
        ("data.batchsize=3", "Unknown setting 'data.batchsize'. Did you mean 'batch_size'"),
        ("health.max_klein=3", "Unknown setting 'health.max_klein'. Did you mean 'max_kl'"),
        ("rollout.groupsize=3", "Unknown setting 'rollout.groupsize'. Did you mean 'group_size'? Valid: engine,"),
        ("rollout.sampling.temprature=1", "Unknown setting 'rollout.sampling.temprature'. Did you mean 'temperature'?"),
        ("rollout.engine.gpu_mem=1", "Unknown setting 'rollout.engine.gpu_mem'. Valid: dtype, enable_prefix_caching"),
        ("trainer.max_step=3", "Unknown setting 'trainer.max_step'. Did you mean 'max_steps'"),
    ],
)
def test_unknown_setting_as_an_option(option, told):
    assert told in refused("fit", "-c", PROSE, f"--{option}")


def test_an_unknown_setting_is_looked_up_in_the_class_that_is_used():
    told = refused("fit", "-c", PROSE, "--model.estimator=GRPO", "--model.estimator.target_n=3")
    assert "Unknown setting 'model.estimator.target_n'. Valid: eps." in told


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("modle: {policy: x}", "Unknown setting 'modle'. Did you mean 'model'?"),
        ("model: {init_args: {polcy: x}}", "Unknown setting 'model.polcy'. Did you mean 'policy'?"),
        (
            "model: {init_args: {estimator: {class_path: TEA, init_args: {target: 3}}}}",
            "Unknown setting 'model.estimator.target'. Did you mean 'target_n'?",
        ),
        (
            "model: {init_args: {estimator: {class_path: TEA, target_n: 3}}}",
            "Arguments of a class go under init_args: {class_path: tealightning.estimators.TEA, init_args: {target_n",
        ),
        ("model: {init_args: {estimator: {class_path: TAE}}}", "Unknown estimator 'TAE'. Did you mean 'tea'?"),
        ("model: {init_args: {loss: {kl_cof: 1}}}", "Unknown setting 'model.loss.kl_cof'. Did you mean 'kl_coef'?"),
        ("model: {init_args: {loss: 3}}", "model.loss: expected settings of PolicyGradientLoss (key: value), got '3'."),
        ("data: {init_args: {bath_size: 1}}", "Unknown setting 'data.bath_size'. Did you mean 'batch_size'"),
        ("data: {init_args: {batch_size: x}}", "data.batch_size: expected an integer, got 'x'."),
        ("rollout: {groupsize: 4}", "Unknown setting 'rollout.groupsize'. Did you mean 'group_size'?"),
        ("rollout: {sampling: {temperature: hot}}", "rollout.sampling.temperature: expected a number, got 'hot'."),
        ("rollout: {engine: vllm}", "Unknown engine 'vllm'. Did you mean 'vllm_engine'?"),
        (
            "rollout: {engine: null}",
            "rollout.engine must be set, got null. Valid: transformers_engine, vllm_engine, vllm_server_engine.",
        ),
        ("trainer: {max_step: 3}", "Unknown setting 'trainer.max_step'. Did you mean 'max_steps'"),
        (
            "trainer: {callbacks: [{class_path: tealightning.SampleTable, init_args: {every: 1}}]}",
            "Unknown setting 'trainer.callbacks.every'. Did you mean 'every_n_steps'?",
        ),
        ("model: [", "overlay.yaml, line 1: this is not YAML: "),
        ("quickstart", "overlay.yaml: expected settings, `name: value`, got 'quickstart'."),
    ],
)
def test_wrong_setting_in_yaml(tmp_path, yaml, told):
    assert told in refused("fit", "-c", PROSE, "-c", overlay(tmp_path, yaml))


def test_a_wrong_setting_in_yaml_names_the_file(tmp_path):
    file = overlay(tmp_path, "rollout: {group_size: many}", name="mine.yaml")
    assert f"error: {file}: rollout.group_size: expected an integer, got 'many'." in refused(
        "fit", "-c", PROSE, "-c", file
    )


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("rollout.group_size=abc", "rollout.group_size: expected an integer, got 'abc'."),
        ("rollout.group_size=1.5", "rollout.group_size: expected an integer, got '1.5'."),
        ("model.estimator.target_n=abc", "model.estimator.target_n: expected an integer, got 'abc'."),
        (
            "model.estimator.scale=std",
            "model.estimator.scale: expected 'tail_rms' or 'tail_std' or 'group_std', got 'std'.",
        ),
        ("model.loss.kl_coef=abc", "model.loss.kl_coef: expected a number, got 'abc'."),
        ("model.optimizer.lr=abc", "model.optimizer.lr: expected a number, got 'abc'."),
        ("model.dtype=fp8", "model.dtype: expected 'float32' or 'bfloat16' or 'auto', got 'fp8'."),
        ("model.ns=4", "model.ns: expected a list, got '4'."),
        ("model.ns=[1,a]", "model.ns: expected an integer, got 'a'."),
        ("model.gradient_checkpointing=maybe", "model.gradient_checkpointing: expected true or false, got 'maybe'."),
        ("rollout.sampling=hot", "rollout.sampling: expected settings of SamplingConfig (key: value), got 'hot'."),
        ("rollout.sampling.stop=abc", "rollout.sampling.stop: expected a list, got 'abc'."),
        ("seed_everything=abc", "seed_everything: expected true or false or an integer, got 'abc'."),
        ("trainer.precision=fp8", "trainer.precision: expected 64 or 32 or 16 or 'transformer-engine'"),
    ],
)
def test_wrong_type(option, told):
    assert told in refused("fit", "-c", PROSE, f"--{option}")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["-c", "quikstart.yaml"], "config: there is no file "),
        (["-c", QUICKSTART.replace("quick", "quik")], "configs/quikstart.yaml. Did you mean 'quickstart.yaml'?"),
        ([], "Not set: rollout.engine, rollout.reward, data, model. Start from a config: `tealightning fit -c"),
        (["-c", PROSE, "stray"], "Unexpected argument 'stray': a setting is --name=value, a file is -c"),
        (["-c", PROSE, "--import", "nope.py"], "--import nope.py: no such file"),
        (["-c", PROSE, "--import", "no_such_module"], "--import no_such_module: no module of that name."),
        (["--import"], "argument --import: expected one argument"),
    ],
)
def test_wrong_arguments(args, told):
    assert told in refused("fit", *args)


@pytest.fixture
def fit_args(playground, tmp_path):
    (tmp_path / "run").mkdir()
    return [*quickstart_args("fit", playground, tmp_path / "run"), "--rollout.engine=transformers_engine"]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "rollout.sampling.temperature=0",
            "error: rollout.sampling.temperature must be a finite number above 0, got 0.0.",
        ),
        (
            "model.estimator.alpha=3",
            "error: model.estimator.alpha must be a number in (0, 1], got 3.0.",
        ),
        ("model.loss.kl_coef=-1", "error: model.loss.kl_coef must be a finite number of at least 0, got -1.0."),
        (
            "model.ns=[0,4]",
            "error: model.ns must hold different integers of at least 1, for example [1, 4, 16]; got [0, 4].",
        ),
        ("rollout.group_size=0", "error: rollout.group_size must be at least 1, got 0."),
        (
            "rollout.group_size=2",
            "error: rollout.group_size: optimal_tea needs at least 3 rollouts a prompt, got group_size=2: the tail",
        ),
        ("data.batch_size=0", "error: data.batch_size must be at least 1, got 0."),
        (
            "model.policy=runs/no/policy",
            "error: model.policy: policy 'runs/no/policy': there is no such folder (looked in ",
        ),
        ("health.max_nonfinite_steps=0", "health.max_nonfinite_steps must be at least 1, or null for no check, got 0."),
        ("health.stop_on=[mismach]", "health.stop_on: there is no check 'mismach'. Did you mean 'mismatch'"),
        ("rollout.reward.model=runs/no/reward_model", "'runs/no/reward_model'"),
        ("ckpt_path=no.ckpt", "ckpt_path: there is no file "),
        ("trainer.gradient_clip_val=1", "trainer.gradient_clip_val is not supported: set model.gradient_clip_norm"),
    ],
)
def test_out_of_range_or_missing(fit_args, option, told):
    assert told in refused(*fit_args, f"--{option}")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.jsonl", None, "There is no file "),
        ("empty.jsonl", "", "empty.jsonl' has no rows."),
        ("column.jsonl", '{"promt": "a"}\n', "there is no column 'prompt'. Did you mean 'promt'? Valid: promt."),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "broken.jsonl, line 2 is not JSON: "),
    ],
)
def test_wrong_prompt_file(fit_args, tmp_path, name, content, told):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    assert told in refused(*fit_args, f"--data.train={file}")


REWARDS = """
def raises(prompts, completions, metadata):
    return [1 / 0 for _ in completions]

def too_few(prompts, completions, metadata):
    return [1.0]

def texts(prompts, completions, metadata):
    return ["good" for _ in completions]

def first_group_unscorable(prompts, completions, metadata):
    return [None if i < 8 else float(i) for i in range(len(completions))]
"""


@pytest.fixture
def rewards_file(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    return file


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("raises", "reward function 'raises' raised ZeroDivisionError on 32 completions: division by zero"),
        ("too_few", "reward 'too_few' must return 32 values, one per completion, got shape (1,)."),
        ("texts", "reward 'texts' must return one number per completion (None or NaN = unscorable): value 0 is 'good'"),
        ("no_such", "has no function 'no_such'. Valid: first_group_unscorable, raises, texts, too_few."),
    ],
)
def test_wrong_reward_function(fit_args, rewards_file, function, told):
    options = ["--rollout.reward=FunctionReward", f"--rollout.reward.function={rewards_file}:{function}"]
    assert told in refused(*fit_args, *options)


def test_rewards_that_an_estimator_refuses_are_told_with_what_to_do(fit_args):
    told = refused(*fit_args, "--model.estimator=max_rl")
    assert "error: max_rl takes rewards of at least 0, got -" in told
    assert "take tail_rl" in told and "a score in [0, 1]" in told


def test_debug_shows_the_traceback_of_a_reward_function(fit_args, rewards_file):
    options = ["--rollout.reward=FunctionReward", f"--rollout.reward.function={rewards_file}:raises"]
    assert "(--debug shows the traceback)" in refused(*fit_args, *options)
    (rewards_file.parent / "run" / "config.yaml").unlink()
    with pytest.raises(RuntimeError) as raised:
        run(*fit_args, *options, "--debug")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_group_without_any_score_is_survived_and_counted(fit_args, rewards_file, tmp_path):
    options = [
        "--rollout.reward=FunctionReward",
        f"--rollout.reward.function={rewards_file}:first_group_unscorable",
    ]
    result = run(*fit_args, *options)
    assert result.status == 0, result.err
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    for row in rows:
        metrics = dict(zip(header.split(","), row.split(","), strict=True))
        assert float(metrics["rollout/unscorable_fraction"]) == 0.25
        assert float(metrics["train/groups_too_small"]) == 0.25
        assert float(metrics["rollout/reward_mean"]) == sum(range(8, 32)) / 24
        assert float(metrics["train/grad_norm"]) > 0


# ---------------------------------------------------------------- defects


def test_a_bad_call_inside_the_package_is_no_error_of_the_user(monkeypatch):
    monkeypatch.setattr(commands, "_describe", None)  # the package calls it: TypeError
    with pytest.raises(TypeError, match="not callable") as raised:
        run("estimators")
    assert "it is a defect: please report it" in raised.value.__notes__[0]


def test_rows_of_other_lengths_inside_the_package_are_no_error_of_the_user(monkeypatch):
    # zip(strict=True): ValueError
    monkeypatch.setattr(commands, "_describe", lambda cls: ("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="zip") as raised:
        run("estimators")
    assert "it is a defect: please report it" in raised.value.__notes__[0]


def test_a_defect_in_a_constructor_keeps_its_traceback(fit_args, monkeypatch):
    monkeypatch.setattr("tealightning.estimators._tail.check_share", None)
    with pytest.raises(TypeError, match="not callable") as raised:
        run(*fit_args)
    assert raised.traceback[-1].path.name == "_tail.py"


CONSTRUCTOR = """
from tealightning.estimators import GRPO, register


@register
class {name}(GRPO):
    def __init__(self, *, height: float = 1.0) -> None:
        super().__init__()
        {statement}
"""


@pytest.mark.parametrize(
    ("name", "statement", "message"),
    [
        ("RefusesHeight", "raise ValueError(f'height must be above 2, got {height}.')", "height must be above 2, got"),
        ("AddsHeight", "self.height = height + 'm'", ": unsupported operand type(s) for +"),
    ],
)
def test_an_error_of_the_users_own_class_names_its_setting(fit_args, tmp_path, monkeypatch, name, statement, message):
    monkeypatch.setattr(ESTIMATORS, "_classes", dict(ESTIMATORS._classes))
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / f"{name.lower()}.py"
    file.write_text(CONSTRUCTOR.format(name=name, statement=statement))
    told = refused(*fit_args, "--import", file, f"--model.estimator={name}", "--model.estimator.height=1")
    assert "error: model.estimator" in told and message in told
    assert "(--debug shows the traceback)" in told


def test_a_registered_class_without_a_base_class_is_an_error_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "without_base.py"
    file.write_text("from tealightning import register\n\n\n@register\nclass Mine:\n    pass\n")
    assert "@register takes a subclass of AdvantageEstimator, Reward" in refused("estimators", "--import", file)


def test_a_config_that_does_not_parse_is_an_error_with_its_key_and_file(tmp_path):
    file = overlay(tmp_path, "rollout: {group_size: many}")
    with pytest.raises(UserError) as raised:
        training.build_training("fit", ["-c", PROSE, "-c", file])
    assert (raised.value.key, raised.value.file) == ("rollout.group_size", file)
    assert str(raised.value) == f"{file}: rollout.group_size: expected an integer, got 'many'."


def test_errors_of_the_user_are_the_built_in_errors_that_they_were():
    assert issubclass(UserError, ValueError) and issubclass(MissingFileError, FileNotFoundError)
    error = pickle.loads(pickle.dumps(UserError("it is wrong", key="a.b", file="c.yaml")))
    assert (str(error), error.key, error.file) == ("c.yaml: it is wrong", "a.b", "c.yaml")
