"""Tokenizers without padding, with the end as padding, without a template, of another size than the embedding."""

import json
from pathlib import Path

import pytest
import torch
from playground_fits import record_of, trainer_of
from tiny_policies import EOS, TOKENS, save_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tealightning import PostTrainingModule, PromptDataModule, RolloutCallback
from tealightning.estimators import build_estimator
from tealightning.rewards import FunctionReward
from tealightning.rollouts import TransformersEngine
from tealightning.types import SamplingConfig


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "abcdefgh"[: 2 + i % 6]}) + "\n" for i in range(8)))
    return file


def count_letters(prompts, completions, metadata):
    return [float(sum(text.count(letter) for letter in "aeiou")) for text in completions]


def train(folder: str, prompts: Path, **data):
    module = PostTrainingModule(
        policy=folder,
        estimator=build_estimator("grpo"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ns=[1, 4],
    )
    rollout = RolloutCallback(
        TransformersEngine(),
        FunctionReward(count_letters),
        group_size=8,
        sampling=SamplingConfig(max_new_tokens=10),
        seed=3,
    )
    trainer = trainer_of(rollout, max_steps=2)
    trainer.fit(module, datamodule=PromptDataModule(train=str(prompts), batch_size=4, **data))
    return module, record_of(trainer)


def with_tokenizer(folder: Path, **special) -> str:
    """The policy of `save_policy`, whose tokenizer has other special tokens."""
    path = save_policy(folder)
    saved = AutoTokenizer.from_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=saved.backend_tokenizer, **special).save_pretrained(path)
    return path


def with_embeddings(folder: Path, count: int) -> str:
    """The policy of `save_policy` with another number of embeddings."""
    path = save_policy(folder)
    policy = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    policy.resize_token_embeddings(count, mean_resizing=False)
    policy.save_pretrained(path)
    return path


@pytest.mark.fault(
    "tokenizers without padding and with the end of sequence as padding",
    how="the same run with 3 tokenizers: same digits",
)
def test_the_padding_token_changes_no_digit(tmp_path, prompts, injected):
    """Pad equals eos, or there is none (TRL #4970): masks come from the lengths, so that all runs are the same."""
    special = [
        {"eos_token": "<eos>"},
        {"eos_token": "<eos>", "pad_token": "<eos>"},
        {"eos_token": "<eos>", "pad_token": "<|im_end|>"},
    ]
    runs = []
    for index, tokens in enumerate(special):
        module, record = train(with_tokenizer(tmp_path / str(index), **tokens), prompts)
        runs.append(record)
        assert module.tokenizer.pad_token_id is not None
        lengths = [len(ids) for step in record.steps for ids in step["tokens"]]
        assert min(lengths) < max(lengths)  # there is padding
        assert any(ids[-1] == EOS for step in record.steps for ids in step["tokens"])
    for other in runs[1:]:
        assert [step["tokens"] for step in other.steps] == [step["tokens"] for step in runs[0].steps]
        assert torch.equal(other.weights, runs[0].weights)
    assert runs[0].largest_move > 0
    injected(times=len(special))


@pytest.mark.fault(
    "more embeddings than the tokenizer has tokens (padded vocabularies)",
    how="40 embeddings for 32 tokens: ids beyond are sampled and trained on",
)
def test_a_padded_embedding_trains_and_its_ids_are_legal(tmp_path, prompts, injected):
    module, record = train(with_embeddings(tmp_path / "policy", 40), prompts)
    sampled = [token for step in record.steps for ids in step["tokens"] for token in ids]
    assert len(module.tokenizer) == len(TOKENS) < max(sampled) + 1 <= 40
    assert max(record.series("rollout/log_prob_abs_diff_max")) < 1e-4
    assert record.largest_move > 0
    injected(times=sum(token >= len(TOKENS) for token in sampled))


@pytest.mark.fault(
    "fewer embeddings than the tokenizer has tokens", how="a prompt with such a token; a pad beyond the embeddings"
)
def test_a_token_without_embedding_is_refused_before_the_policy_loads(tmp_path, prompts, monkeypatch, injected):
    folder = with_embeddings(tmp_path / "policy", 30)
    with prompts.open("a") as file:
        file.write('{"prompt": "ab,"}\n')  # "," has id 30
    loaded = []
    monkeypatch.setattr("tealightning.training.policy_module.load_policy", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(
        ValueError, match=r"prompt '8' \(line 9\) holds token 30 \(','\), and the policy has 30 embeddings"
    ):
        train(folder, prompts)
    assert not loaded
    monkeypatch.undo()
    prompts.write_text("".join(f'{{"prompt": "{"abc"[:n]}"}}\n' for n in (1, 2, 3, 1)))
    saved = AutoTokenizer.from_pretrained(folder)
    saved.pad_token = "!"  # id 31
    saved.save_pretrained(folder)
    module, record = train(folder, prompts)
    assert module.tokenizer.pad_token_id == 31
    assert record.largest_move > 0
    injected(times=2)


@pytest.mark.fault("chats as prompts and a tokenizer without a chat template", how="a data set of chats")
def test_chats_without_a_template_are_refused_with_their_line(tmp_path, prompts, injected):
    prompts.write_text('{"prompt": "ab"}\n{"prompt": [{"role": "user", "content": "ab"}]}\n')
    with pytest.raises(
        ValueError, match=r"data\.train: .*line 2: a prompt is a chat, but the tokenizer .* has no chat template"
    ):
        train(save_policy(tmp_path / "policy"), prompts)
    injected(times=1)


@pytest.mark.fault(
    "a prompt that leaves no room for a completion", how="one of 9 prompts is longer than the policy's positions"
)
def test_a_prompt_that_does_not_fit_is_refused_before_the_policy_loads(tmp_path, prompts, monkeypatch, injected):
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "a" * 250}) + "\n")
    folder = save_policy(tmp_path / "policy")
    loaded = []
    monkeypatch.setattr("tealightning.training.policy_module.load_policy", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(
        ValueError, match=r"data\.train: prompt '8' \(line 9\) has 250 tokens, more than the 246 .* of 256"
    ):
        train(folder, prompts)
    assert not loaded
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="dropped 1 of 9 prompts longer than 200 tokens"):
        train(folder, prompts, max_prompt_tokens=200)
    injected(times=1)
