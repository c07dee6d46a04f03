import shutil

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning import ExportPolicy
from tealightning.errors import UserError


def test_export_loads_with_transformers_and_has_the_trained_logits(playground, tmp_path):
    trainer, record = fit(
        playground, steps=2, callbacks=[ExportPolicy()], logger=CSVLogger(tmp_path, name="", version="")
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = tokenizer("The file is closed", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, loaded = (model(ids).logits for model in (trainer.lightning_module.policy, exported))
        original = AutoModelForCausalLM.from_pretrained(playground / "policy").eval()(ids).logits
    assert torch.equal(trained, loaded)
    assert (original - loaded).abs().max() > 1e-3 and record.largest_move > 0
    assert list((tmp_path / "policy").glob("*.safetensors"))


def test_export_writes_where_it_is_told(playground, tmp_path):
    fit(playground, steps=1, callbacks=[ExportPolicy("exported/final")], default_root_dir=tmp_path)
    assert (tmp_path / "exported" / "final" / "config.json").is_file()


@pytest.mark.parametrize("folder", ["", ".", "..", "a/../..", "checkpoints", "evaluations/x"])
def test_a_folder_that_holds_other_files_is_refused(folder):
    with pytest.raises(UserError, match="folder must be one that holds nothing but the export"):
        ExportPolicy(folder)


def test_what_the_end_needs_is_tried_before_the_policy_is_loaded(playground, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for folder, told in (
        ("file", "is there already"),
        ("mine", "is there already"),
        ("file/policy", "cannot be written"),
    ):
        with pytest.raises(UserError, match=told):
            fit(playground, steps=1, callbacks=[ExportPolicy(folder)], default_root_dir=tmp_path)
    broken = tmp_path / "policy_in"
    shutil.copytree(playground / "policy", broken)
    (broken / "generation_config.json").write_text("{")
    module = module_of(playground)
    module.policy_path = str(broken)
    trainer = trainer_of(rollout_of(playground), ExportPolicy(), default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"cannot read its generation_config\.json"):
        trainer.fit(module, datamodule=data_of(playground))
    assert module.policy is None and (tmp_path / "mine" / "thesis.txt").is_file()
