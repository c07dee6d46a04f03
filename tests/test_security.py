"""What docs/security.md guarantees: no code from data, weights or configs, and no secret in anything that is kept."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_line import PROSE, overlay, run
from run_records import quickstart_args
from stub_server import stub_server
from transformers import AutoTokenizer

from tealightning.data import PromptDataModule
from tealightning.data.sources import read_rows
from tealightning.pretrained import load_policy
from tealightning.rewards import SequenceClassifierReward
from tealightning.rollouts.vllm_client import ServerError, VLLMClient
from tealightning.rollouts.vllm_server import VLLMServerEngine, serve_command, serve_environment
from tealightning.text.chat import ChatFormatter

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- the source

UNSAFE_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CONDITIONS = {
    "torch.load": lambda arguments: arguments.get("weights_only") == "True",
    "np.load": lambda arguments: arguments.get("allow_pickle", "False") == "False",
    "numpy.load": lambda arguments: arguments.get("allow_pickle", "False") == "False",
}
UNSAFE_ARGUMENTS = {"shell": "True", "verify": "False", "trust_remote_code": "True", "allow_pickle": "True"}

ALLOWED = {
    # The class of the exception that torch.load raises, which is called with weights_only.
    ("tealightning/reliability/checkpoint_files.py", "import pickle"),
    # The class of an exception: the process that it talks to runs the function of the user.
    ("tealightning/rewards/function.py", "import pickle"),
    # _SafeLoader is a yaml.SafeLoader: the tests of YAML tags below are of it.
    ("tealightning/strict_yaml.py", "yaml.load(text, Loader=_SafeLoader)"),
}


def unsafe_parts(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_unsafe = name in UNSAFE_CALLS or not CONDITIONS.get(name, lambda arguments: True)(arguments)
            if is_unsafe or any(arguments.get(key) == value for key, value in UNSAFE_ARGUMENTS.items()):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec('1')", "import pickle", "from pickle import loads", "yaml.load(text)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "os.system('ls')",
        "subprocess.run('ls', shell=True)", "requests.get(url, verify=False)", "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_unsafe_source_would_be_found(source):
    assert unsafe_parts(source)


def test_no_source_runs_code_from_data():
    files = [*sorted((ROOT / "tealightning").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
    found = {
        (str(file.relative_to(ROOT)), part.partition(": ")[2])
        for file in files
        for part in unsafe_parts(file.read_text())
    }
    assert found == ALLOWED


# ---------------------------------------------------------------- weights, checkpoints, data


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that makes a folder, which must not be there when the test ends."""
    exploded = tmp_path / "exploded"
    yield Bomb(exploded)
    assert not exploded.exists(), "a pickle was run"


def with_pickled_weights(model, folder, bomb):
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"bomb": bomb}, folder / "pytorch_model.bin")
    return str(folder)


def test_pickled_weights_of_a_policy_are_refused(playground, tmp_path, bomb):
    folder = with_pickled_weights(playground / "policy", tmp_path / "policy", bomb)
    with pytest.raises(ValueError, match=r"policy '.*' has no safetensors weights, only pytorch_model\.bin.*convert"):
        load_policy(folder)


def test_pickled_weights_of_a_reward_model_are_refused(playground, tmp_path, bomb):
    folder = with_pickled_weights(playground / "reward_model", tmp_path / "reward", bomb)
    with pytest.raises(ValueError, match=r"model '.*' has no safetensors weights, only pytorch_model\.bin"):
        SequenceClassifierReward(folder).setup(torch.device("cpu"))


def test_safetensors_are_asked_for_whatever_the_hub_offers(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    asked = []

    def from_pretrained(path, **kwargs):
        asked.append(kwargs)
        raise OSError("org/model does not appear to have a file named model.safetensors")

    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="has no safetensors weights"):
        load_policy("org/model")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: SimpleNamespace(num_labels=1))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: SimpleNamespace(pad_token_id=0))
    with pytest.raises(ValueError):
        SequenceClassifierReward("org/model", chat_template=False).setup(torch.device("cpu"))
    assert asked and all(kwargs["use_safetensors"] and not kwargs["trust_remote_code"] for kwargs in asked)


@pytest.mark.parametrize("load", ["policy", "tokenizer", "data.tokenizer", "reward"])
def test_code_that_ships_with_a_model_is_not_run_unless_asked(playground, tmp_path, load):
    """Without asking the terminal either, as transformers does where nothing is said."""
    source = "reward_model" if load == "reward" else "policy"
    folder = tmp_path / "model"
    shutil.copytree(playground / source, folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nclass Own: pass\n")
    for name, entries in (
        ("config.json", {"model_type": "own", "auto_map": dict.fromkeys(
            ["AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"], "own.Own")}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}),
    ):  # fmt: skip
        settings = json.loads((folder / name).read_text()) | entries
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code"):
        if load == "policy":
            load_policy(str(folder))
        elif load == "reward":
            SequenceClassifierReward(str(folder)).setup(torch.device("cpu"))
        elif load == "tokenizer":
            from tealightning.pretrained import load_tokenizer

            load_tokenizer(str(folder))
        else:
            PromptDataModule(train="x.jsonl", tokenizer=str(folder)).setup("fit")
    assert not (tmp_path / "exploded").exists()


def test_checkpoint_that_would_run_code_is_refused(playground, tmp_path, bomb):
    torch.save(
        {"state_dict": {}, "global_step": 1, "bomb": bomb, "pytorch-lightning_version": "2.6"}, tmp_path / "a.ckpt"
    )
    args = [*quickstart_args("fit", playground, tmp_path), "--rollout.engine=transformers_engine"]
    result = run(*args, f"--ckpt_path={tmp_path / 'a.ckpt'}")
    assert result.status == 2
    assert "holds more than tensors and plain values" in result.err and "--weights_only=false" in result.err


def test_folder_of_sharded_weights_is_warned_about(playground, tmp_path):
    args = [*quickstart_args("fit", playground, tmp_path), "--rollout.engine=transformers_engine"]
    with pytest.warns(UserWarning, match="list of contents is a pickle"):
        result = run(*args, f"--ckpt_path={tmp_path}")
    assert result.status == 2


@pytest.mark.parametrize("name", ["prompts.pkl", "prompts.pt", "prompts.npy", "prompts.pickle"])
def test_pickled_data_is_refused(tmp_path, bomb, name):
    (tmp_path / name).write_bytes(pickle.dumps([{"prompt": bomb}]))
    with pytest.raises(ValueError, match=r"cannot tell the format"):
        read_rows(str(tmp_path / name))


def test_folder_of_pickled_data_or_with_a_loading_script_is_refused(tmp_path, bomb):
    for number, (name, content) in enumerate(
        [("train.pkl", pickle.dumps([bomb])), ("data.py", f"import os; os.mkdir({str(bomb.file)!r})".encode())]
    ):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError):
            read_rows(str(folder))


def test_chat_template_is_run_in_a_sandbox(playground):
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    for template in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"the chat template refuses .* unsafe"):
            ChatFormatter(tokenizer, True).encode_prompts(["a prompt"])


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "text",
    [
        "seed_everything: !!python/object/apply:os.mkdir [{file}]",
        "model: !!python/object/new:os.mkdir [{file}]",
        "trainer: {{max_steps: !!python/name:os.mkdir ''}}",
    ],
)
def test_yaml_tags_build_nothing(tmp_path, text):
    file = overlay(tmp_path, text.format(file=tmp_path / "exploded"))
    for args in (["fit", "-c", PROSE, "-c", file], ["fit", "-c", file], ["compare", "-c", file]):
        result = run(*args)
        assert result.status == 2
        assert "this is not YAML" in result.err, result.err
    assert not (tmp_path / "exploded").exists()


def test_texts_are_not_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    texts = ["${oc.env:SECRET}", "${SECRET}", "{{ 7 * 7 }}", "$SECRET"]
    for text in texts:
        settings = {"data": {"init_args": {"system_prompt": text}}}
        result = run("fit", "-c", PROSE, "-c", overlay(tmp_path, settings), "--print_config")
        assert result.status == 0
        assert yaml.safe_load(result.out)["data"]["init_args"]["system_prompt"] == text


def test_environment_sets_nothing(monkeypatch):
    for name in ("SEED_EVERYTHING", "TEALIGHTNING_SEED_EVERYTHING", "PL_FIT__SEED_EVERYTHING", "FIT__SEED_EVERYTHING"):
        monkeypatch.setenv(name, "7")
    result = run("fit", "-c", PROSE, "--print_config")
    assert yaml.safe_load(result.out)["seed_everything"] == 0


CLASSES = [
    "model", "model.estimator", "model.loss", "model.lora", "model.optimizer", "model.lr_scheduler", "data",
    "rollout.engine", "rollout.reward", "rollout.sampling", "trainer.logger", "trainer.callbacks", "trainer.plugins",
]  # fmt: skip


@pytest.mark.parametrize("key", CLASSES)
def test_callables_of_no_such_class_are_refused_uncalled(key, tmp_path, monkeypatch):
    called = []
    (tmp_path / "would_run.py").write_text("import os\nos.mkdir(os.path.join(os.path.dirname(__file__), 'exploded'))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *args, **kwargs: called.append(args))
    monkeypatch.setattr(os, "makedirs", lambda *args, **kwargs: called.append(args))
    for path, arguments in (
        ("subprocess.Popen", {"args": ["true"]}),
        ("os.makedirs", {"name": "exploded"}),
        ("builtins.eval", {}),
        ("importlib.import_module", {"name": "would_run"}),
    ):
        value = {"class_path": path, "init_args": arguments}
        settings = [value] if key == "trainer.callbacks" else value
        for part in reversed(key.split(".")):
            inside = part not in ("model", "data") or key == part
            settings = {part: settings} if inside else {part: {"init_args": settings}}
        if key == "model.lora" or (key.count(".") and key.startswith("model.")):
            settings = {"model": {"init_args": settings["model"].get("init_args", settings["model"])}}
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr("tealightning.cli.training.write_whole", lambda *args: called.append(args))
            result = run("fit", "-c", PROSE, "-c", overlay(tmp_path, settings))
        assert result.status == 2, (path, result.out)
        assert "\ntealightning: error: " in f"\n{result.err}"  # behind what Lightning has logged by then
    assert "would_run" not in sys.modules and not (tmp_path / "exploded").exists()
    assert [args for args in called if args and "sys.path" not in str(args)] == []


NESTED = {
    "model.optimizer": {"model": {"optimizer": "{function}"}},
    "model.lr_scheduler": {"model": {"lr_scheduler": "{function}"}},
    "trainer.callbacks.on_fit_start": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "{function}"},
                }
            ]
        }
    },
}


@pytest.mark.parametrize("key", NESTED)
def test_functions_are_not_called_where_a_callable_is_taken(key, tmp_path, monkeypatch):
    """Whatever jsonargparse makes of a function in the place of a class: here it would call it."""
    (tmp_path / "made_up.py").write_text(
        f"import os\ndef explode(): os.mkdir({str(tmp_path / 'exploded')!r})\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = yaml.safe_dump(NESTED[key]).replace("'{function}'", "{class_path: made_up.explode}")
    assert "made_up" in text
    result = run("fit", "-c", PROSE, "-c", overlay(tmp_path, text))
    sys.modules.pop("made_up", None)
    assert result.status == 2
    assert result.err.startswith(f"tealightning: error: {key}: made_up.explode is not a class."), result.err
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- servers and secrets

CANARIES = {name: f"canary-{name.lower()}-5f1c" for name in ("HF_TOKEN", "VLLM_API_KEY", "WANDB_API_KEY", "REWARD_KEY")}


def context_of(folder):
    return SimpleNamespace(
        policy=SimpleNamespace(config=SimpleNamespace()),
        policy_path=str(folder),
        tokenizer=SimpleNamespace(name_or_path=str(folder)),
        max_model_len=64,
        device=torch.device("cpu"),
    )


def test_servers_that_are_started_listen_on_this_machine_alone(playground):
    pytest.importorskip("vllm")
    command = serve_command(context_of(playground / "policy"), port=1, dtype="float32", nccl=False, serve_args=[])
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--load-format") + 1] == "safetensors"
    for argument in ("--host=0.0.0.0", "--api-key=secret"):
        with pytest.raises(ValueError, match="the engine sets them itself"):
            VLLMServerEngine(serve_args=[argument])


def test_key_of_a_server_is_not_in_its_command_line(playground, monkeypatch):
    pytest.importorskip("vllm")
    context = context_of(playground / "policy")
    command = serve_command(context, port=1, dtype="float32", nccl=False, serve_args=[])
    environment = serve_environment(context, api_key=CANARIES["VLLM_API_KEY"], serve_env={})
    assert environment["VLLM_API_KEY"] == CANARIES["VLLM_API_KEY"]
    assert "canary" not in " ".join(command)


def test_errors_of_a_server_do_not_tell_the_key():
    for status in (401, 404, 500):
        with stub_server({"/v1/models": lambda body, status=status: (status, {"error": "no"})}) as (url, seen):
            client = VLLMClient(url, api_key=CANARIES["VLLM_API_KEY"], timeout_seconds=5)
            with pytest.raises(ServerError) as error:
                client.max_model_len()
            assert seen[0][2]["Authorization"].endswith(CANARIES["VLLM_API_KEY"])
        assert "canary" not in str(error.value) + repr(error.value.__cause__)
        assert "canary" not in repr(client)


def test_requests_do_not_follow_to_another_server():
    with stub_server({}) as (other, seen):
        there = {"Location": f"{other}/v1/models"}
        with stub_server({"/v1/models": lambda body: (307, {}, there)}) as (url, _):
            client = VLLMClient(url, api_key=CANARIES["VLLM_API_KEY"], timeout_seconds=5)
            with pytest.raises(ServerError, match="answered 307"):
                client.max_model_len()
    assert seen == []


def test_secrets_of_the_environment_are_kept_nowhere(playground, tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    callbacks = ["tealightning.BestOfNReport", "tealightning.ExportPolicy", "tealightning.SampleTable"]
    settings = {
        "callbacks": [
            *callbacks,
            {
                "class_path": "tealightning.callbacks.EvaluationRecord",
                "init_args": {"kl_samples": 2, "diversity_samples": 2},
            },
        ],
        "enable_checkpointing": True,
        "limit_val_batches": 1,
        "num_sanity_val_steps": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    args = [*quickstart_args("fit", playground, tmp_path, **settings), "--rollout.engine=transformers_engine"]
    done = run(*args)
    assert done.status == 0, done.err
    failed = run(*args, "--trainer.logger.version=second", "--rollout.reward=FunctionReward",
                 "--rollout.reward.function=math:sqrt")  # fmt: skip
    assert failed.status != 0
    assert "canary" not in done.out + done.err + failed.out + failed.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "model.safetensors"} <= {path.name for path in files}
    assert [path for path in files if path.suffix == ".ckpt"]
    assert [path for path in files if b"canary" in path.read_bytes()] == []
