"""docs/how-to/vllm-server.md against the engine: configurations, settings and flags."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from command_line import PROSE, resolved
from tiny_policies import engine_context, save_policy

from tealightning.rollouts import VLLMServerEngine
from tealightning.rollouts.vllm_server import serve_command, serve_environment

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "vllm-server.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)


@pytest.mark.parametrize("config", CONFIGS, ids=["started here", "running"])
def test_config_of_the_page_is_accepted(config, tmp_path):
    (tmp_path / "server.yaml").write_text(config)
    engine = resolved("-c", PROSE, "-c", tmp_path / "server.yaml")["rollout"]["engine"]
    assert engine["class_path"] == "tealightning.rollouts.VLLMServerEngine"
    VLLMServerEngine(**engine["init_args"])


def test_settings_of_the_page_are_the_engines():
    section = PAGE.split("## Settings")[1].split("##")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    written = {name: default.strip() for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    parameters = {name: p for name, p in inspect.signature(VLLMServerEngine).parameters.items()}
    assert written.keys() == parameters.keys()
    for name, default in written.items():
        value = parameters[name].default
        if name != "weights_dir":  # none means memory
            assert default.strip("`") == ("none" if value is None else f"{value:g}" if value != str(value) else value)


def test_flags_of_the_page_are_those_that_the_engine_starts_with(tmp_path):
    context = engine_context(save_policy(tmp_path))
    context.device = torch.device("cuda", 0)
    command = serve_command(context, port=8000, dtype="bfloat16", nccl=True, serve_args=[])
    table = re.findall(r"^\| `(--[\w-]+)", PAGE, re.M)
    assert {"--enable-scale-out", "--logprobs-mode"} <= set(table) <= set(command)
    assert all(flag in PAGE for flag in command if flag.startswith("--") and flag != "--tokenizer")
    assert serve_environment(context, api_key=None, serve_env={})["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in PAGE
