"""Adapter folders of peft as policies and reward models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tool_scripts import tool
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tealightning import LoRA, PostTrainingModule
from tealightning.adapter_folder import find_adapter
from tealightning.errors import MissingPackageError, UserError
from tealightning.pretrained import base_of, check_weights, load_policy, load_tokenizer, policy_config
from tealightning.rewards import SequenceClassifierReward

tiny = tool("bench/tiny_models.py")
IDS = torch.tensor([[5, 90, 17, 201, 33]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a Llama that ties its head and of one that does not."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        tiny.build("llama", tie_word_embeddings=tied).save_pretrained(folder)
        tiny.byte_tokenizer().save_pretrained(folder)
        folders[tied] = folder
    return folders


def adapter_of(base: Path, folder: Path, config, *, rows: int | None = None, labels: int | None = None):
    """Train nothing, but move every weight of an adapter on `base`, save it in `folder`; the logits or scores of it."""
    if labels is None:
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, config).eval()
    tiny.move([p for p in wrapped.parameters() if p.requires_grad], seed=3, size=0.1)
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(IDS).logits


ADAPTERS = {
    "lora": lambda: LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora_dora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], use_rslora=True, use_dora=True),
    "lora_on_the_embedding": lambda: LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(target_modules=["q_proj", "up_proj"], init_weights=False),
    "head_saved_whole": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding_saved_whole": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "some_tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 90]),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_policy_is_the_base_with_its_adapter(kind, tied, bases, tmp_path):
    expected = adapter_of(bases[tied], tmp_path / "adapter", ADAPTERS[kind]())
    policy = load_policy(str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(policy(IDS).logits, expected, rtol=0, atol=2e-5)
        plain = AutoModelForCausalLM.from_pretrained(bases[tied])(IDS).logits
    assert (plain - expected).abs().max() > 1e-2
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not hasattr(policy, "peft_config") and not any("lora" in name for name, _ in policy.named_parameters())


@pytest.mark.parametrize("rows", [256, 264])
@pytest.mark.filterwarnings("ignore")
def test_resized_embedding_comes_with_the_adapter(rows, bases, tmp_path):
    """Also one that is smaller than the tokenizer or the base's."""
    path = str(tmp_path / "adapter")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    expected = adapter_of(bases[False], tmp_path / "adapter", config, rows=rows)
    with torch.no_grad():
        torch.testing.assert_close(load_policy(path)(IDS).logits, expected, rtol=0, atol=2e-5)
    assert policy_config(path).vocab_size == rows
    module = PostTrainingModule(path, estimator="grpo")
    module.configure_model()
    served = module.served_path()  # the base has another shape
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(served)(IDS).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_training_on_top_and_export_make_a_full_model(bases, tmp_path):
    path = str(tmp_path / "adapter")
    expected = adapter_of(bases[True], tmp_path / "adapter", ADAPTERS["lora"]())
    module = PostTrainingModule(path, estimator="grpo", lora=LoRA(rank=2))
    module.configure_model()
    assert module.served_path() == str(bases[True])
    with torch.no_grad():
        torch.testing.assert_close(module.policy(IDS).logits, expected, rtol=0, atol=2e-5)
    tiny.move([p for p in module.policy.parameters() if p.requires_grad], seed=5)
    module.export(str(tmp_path / "export"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        after = module.policy(IDS).logits
        torch.testing.assert_close(exported(IDS).logits, after, rtol=0, atol=2e-5)
    assert (after - expected).abs().max() > 1e-2
    assert find_adapter(str(tmp_path / "export"), "policy") is None


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_is_the_adapters_own_or_the_bases(bases, tmp_path):
    path = tmp_path / "adapter"
    adapter_of(bases[True], path, ADAPTERS["lora"]())
    assert load_tokenizer(str(path)).name_or_path == str(bases[True])
    own = tiny.byte_tokenizer()
    own.chat_template = "mine"
    own.save_pretrained(path)
    assert load_tokenizer(str(path)).chat_template == "mine"
    assert AutoTokenizer.from_pretrained(bases[True]).chat_template is None


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_an_adapter_is_merged_twice(bases, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    adapter_of(bases[True], first, ADAPTERS["lora"]())
    merged = load_policy(str(first))
    merged.save_pretrained(tmp_path / "merged")
    expected = adapter_of(tmp_path / "merged", second, ADAPTERS["ia3"]())
    rename_base(second, str(first))
    with torch.no_grad():
        torch.testing.assert_close(load_policy(str(second))(IDS).logits, expected, rtol=0, atol=2e-5)
    assert base_of(str(second)) == str(bases[True])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_reward_model_with_its_head_in_the_adapter(name, tmp_path):
    tiny.save(name, tmp_path / "base")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear")
    torch.manual_seed(0)
    expected = adapter_of(tmp_path / "base", tmp_path / "adapter", config, labels=1)
    reward = SequenceClassifierReward(str(tmp_path / "adapter"))
    reward.check()
    reward.setup(torch.device("cpu"))
    text = AutoTokenizer.from_pretrained(tmp_path / "base").decode(IDS[0])
    found = reward.score([""], [text], [{}])
    assert found.item() == pytest.approx(expected.item(), abs=2e-5)


def test_reward_model_without_a_head_in_the_adapter_is_refused(bases, tmp_path):
    adapter_of(bases[True], tmp_path / "adapter", ADAPTERS["lora"]())
    with pytest.raises(UserError, match="it has 2 labels, and a reward model 1"):
        SequenceClassifierReward(str(tmp_path / "adapter")).check()


def rename_base(folder: Path, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged_is_refused_with_the_way_out(bases, tmp_path, monkeypatch):
    path = str(tmp_path / "adapter")
    adapter_of(bases[True], tmp_path / "adapter", ADAPTERS["lora"]())
    for base in ("/nowhere/base", None, "not a folder/ or id"):
        rename_base(tmp_path / "adapter", base)
        with pytest.raises(UserError, match=r"policy '.*adapter' is an adapter.* base|adapter': base"):
            check_weights(path)
    other = tmp_path / "other"
    tiny.save("gpt2", other)
    rename_base(tmp_path / "adapter", str(other))
    with pytest.raises(UserError, match=r"of type LORA that cannot be merged into its base model '.*other'"):
        load_policy(path)
    adapter_of(bases[True], tmp_path / "biased", LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(UserError, match="Impossible to merge LoRA with `lora_bias=True`"):
        load_policy(str(tmp_path / "biased"))
    config = json.loads((bases[True] / "config.json").read_text())
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    text = json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    (quantized / "config.json").write_text(text)
    rename_base(tmp_path / "adapter", str(quantized))
    with pytest.raises(UserError, match="is quantized: merged, the update would be rounded away"):
        policy_config(path)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapter_of(bases[True], tmp_path / "prompts", prompts)
    with pytest.raises(UserError, match="type PROMPT_TUNING, which puts virtual tokens before the prompt"):
        check_weights(str(tmp_path / "prompts"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MissingPackageError, match=r"is an adapter of peft, which cannot be imported.*tealightning\[lora\]"
    ):
        check_weights(path)
