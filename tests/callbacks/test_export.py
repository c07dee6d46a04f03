import torch
from lightning.pytorch.loggers import CSVLogger
from playground_fits import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning import ExportPolicy


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
