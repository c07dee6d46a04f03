"""Folders that cannot be loaded: one message that names the folder, whatever line of transformers met it."""

import json
import shutil
from pathlib import Path

import pytest
from module_fixtures import save_tiny_policy

from tealightning.errors import UserError
from tealightning.pretrained import load_policy
from tealightning.reliability.deadlines import RunEnded


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
        ({"num_hidden_layers": "two"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"vocab_size": 40}, "RuntimeError"),
        (truncate, "incomplete metadata"),
    ],
    ids=["padding", "type", "zero", "shape", "cut off"],
)
def test_a_folder_that_cannot_be_loaded_is_named(policy, tmp_path, changes, why):
    folder = tmp_path / "broken"
    shutil.copytree(policy, folder)
    if callable(changes):
        changes(folder)
    else:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=f"policy '{folder}' cannot be loaded .*{why}"):
        load_policy(str(folder))


def test_weights_that_are_not_in_the_folder_are_no_random_numbers(policy, tmp_path):
    folder = tmp_path / "more_layers"
    shutil.copytree(policy, folder)
    config = folder / "config.json"
    layers = json.loads(config.read_text())["num_hidden_layers"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers + 1}))
    with pytest.raises(UserError, match=rf"has no weights for model\.layers\.{layers}\."):
        load_policy(str(folder))


@pytest.mark.parametrize("error", [RunEnded("loading took too long"), MemoryError("none left")])
def test_what_is_not_the_folders_fault_is_raised_as_it_is(policy, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_policy(policy)
    assert raised.value is error
