"""A policy is exported as it came, whatever its folder says about generation, or refused before it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from module_fixtures import save_tiny_policy, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from tealightning.errors import UserError
from tealightning.pretrained import load_policy, load_tokenizer, policy_config
from tealightning.training.export import save_policy, try_export

ODD = {
    "llama2": {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 0},
    "vicuna": {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "max_length": 4096},
    "min_p": {"min_p": 0.1, "typical_p": 0.5, "top_k": 5},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "no_end": {"max_length": -1, "pad_token_id": -1},
    "unknown": {"a_key": "of tomorrow", "nested": {"list": [1]}},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "outputs": {"output_scores": True},
    "sampling": {"do_sample": True, "temperature": 0.7, "eos_token_id": [0, 1]},
}
REFUSED = {
    "invalid": ("{not json", "JSONDecodeError"),
    "empty": ("", "JSONDecodeError"),
    "list": ("[1, 2]", "TypeError"),
    "no_token": ('{"max_new_tokens": 0}', "max_new_tokens"),
    "compile": ('{"compile_config": {"mode": "default"}}', "compile_config"),
    "greedy_many": ('{"num_return_sequences": 3}', "num_return_sequences"),
    "argument": ('{"logits_processor": []}', "logits_processor"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def folder_with(tiny: str, folder: Path, text: str) -> str:
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(text)
    return str(folder)


def exported(path: str, folder: Path) -> dict:
    try_export(path, policy_config(path), load_tokenizer(path))
    policy = load_policy(path)
    given = policy.generation_config
    save_policy(policy, load_tokenizer(path), str(folder), policy.state_dict())
    assert policy.generation_config is given
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize("name", ODD)
def test_settings_of_generation_survive_the_export(tiny, tmp_path, name):
    found = exported(folder_with(tiny, tmp_path / "in", json.dumps(ODD[name])), tmp_path / "out")
    assert found.pop("transformers_version")
    assert found == ODD[name]


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"max_length": 77}, {"num_beams": 4}])
def test_settings_of_generation_in_an_old_config_survive_too(tiny, tmp_path, setting):
    folder = folder_with(tiny, tmp_path / "in", "{}")
    (tmp_path / "in" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | setting))
    assert exported(folder, tmp_path / "out").items() >= setting.items()


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_loaded_are_refused_with_the_reason(tiny, tmp_path, name):
    text, told = REFUSED[name]
    path = folder_with(tiny, tmp_path / "in", text)
    with pytest.raises(UserError, match=rf"transformers cannot read its generation_config\.json.*{told}"):
        try_export(path, policy_config(path), load_tokenizer(path))


def test_a_tokenizer_that_cannot_be_saved_is_refused(tiny, monkeypatch):
    tokenizer = load_tokenizer(tiny)

    def save(*_, **__):
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr(tokenizer, "save_pretrained", save)
    with pytest.raises(UserError, match=r"cannot save its tokenizer.*no vocabulary file"):
        try_export(tiny, policy_config(tiny), tokenizer)


def test_tensors_that_code_shares_without_saying_so_are_saved_under_both_names(tiny, tmp_path):
    policy = tiny_llama()
    first, second = (layer.self_attn.q_proj for layer in policy.model.layers)
    second.weight = nn.Parameter(first.weight.detach())
    second.weight = first.weight
    save_policy(policy, load_tokenizer(tiny), str(tmp_path), policy.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].self_attn.q_proj.weight, first.weight)
