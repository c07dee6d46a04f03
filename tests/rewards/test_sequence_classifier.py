import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel

from tealightning.rewards import SequenceClassifierReward

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
COMPLETIONS = ["", "a", " and then some more", " abc", " the end.", " a", "?", " of a longer answer, it is"]


def loaded(folder: Path, **settings) -> SequenceClassifierReward:
    reward = SequenceClassifierReward(str(folder), **settings)
    reward.setup(CPU)
    return reward


def score(reward: SequenceClassifierReward, completions: list[str], prompt="Once") -> torch.Tensor:
    n = len(completions)
    return reward([prompt] * n, completions, [{}] * n).total


def last_token_logit(folder: Path, text: str) -> float:
    """transformers on one unpadded sequence: without a padding id it reads the score at the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def test_score_is_the_logit_at_the_last_token(playground: Path):
    folder = playground / "reward_model"
    scores = score(loaded(folder), COMPLETIONS)
    expected = [last_token_logit(folder, "Once" + c) for c in COMPLETIONS]
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    assert scores.std() > 1e-3  # different completions do get different scores


@pytest.mark.parametrize("split", [{"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 1}, {"batch_tokens": 60}])
def test_score_does_not_depend_on_the_batch(classifier_folder, split):
    folder = classifier_folder()
    scores = score(loaded(folder), COMPLETIONS)
    torch.testing.assert_close(score(loaded(folder, **split), COMPLETIONS), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(score(loaded(folder), COMPLETIONS[::-1]), scores.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad_token_id", [1, 2, None])  # eos, its own, not set
def test_final_eos_is_scored_whatever_the_padding_token_is(classifier_folder, pad_token_id):
    folder = classifier_folder(template=TEMPLATE, pad_token_id=pad_token_id)
    scores = score(loaded(folder), ["a", " longer answer"])
    expected = [last_token_logit(folder, f"Once<eos>{c}<eos>") for c in ["a", " longer answer"]]
    at_text = [last_token_logit(folder, f"Once<eos>{c}") for c in ["a", " longer answer"]]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (scores - torch.tensor(at_text)).abs().min() > 1e-3  # where stepping back over eos would end up


def test_batch_may_have_more_rows_than_the_vocabulary(classifier_folder):
    reward = loaded(classifier_folder(), batch_size=300)
    completions = [chr(32 + i % 90) for i in range(300)]
    torch.testing.assert_close(score(reward, completions)[:90], score(reward, completions[:90]), atol=1e-5, rtol=0)


def test_scores_are_neither_squashed_nor_clipped(classifier_folder):
    """OpenRLHF clips to +-10 and verl applies a sigmoid by default, which destroys the upper tail."""
    plain = score(loaded(classifier_folder()), COMPLETIONS)
    scaled = score(loaded(classifier_folder(head_scale=1000.0)), COMPLETIONS)
    torch.testing.assert_close(scaled, plain * 1000, atol=1e-2, rtol=1e-4)
    assert scaled.abs().max() > 100


def test_too_long_input_is_unscorable_and_warned_about_once(classifier_folder):
    reward = loaded(classifier_folder())
    assert reward.max_length == 64
    with pytest.warns(UserWarning, match="1 completions are longer than the 64 tokens"):
        scores = score(reward, ["x" * 60, "x" * 61, "x"])  # "Once" has 4 tokens
    assert torch.isnan(scores).tolist() == [False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(reward, ["x" * 99, "x" * 61])
    assert reward.too_long == 3


def test_chat_prompt_is_scored_through_the_template(classifier_folder):
    folder = classifier_folder(template=TEMPLATE)
    scores = score(loaded(folder), ["yes"], prompt=[{"role": "user", "content": "Really"}])
    assert scores.item() == pytest.approx(last_token_logit(folder, "Really<eos>yes<eos>"), abs=1e-5)


def test_reward_model_reads_text_with_its_own_tokenizer_not_the_policys(playground: Path, classifier_folder):
    """A reward model that was given the policy's token ids scored another text in OpenRLHF #242."""
    folder, text = classifier_folder(), "Return the value"
    own, policys = (AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (folder, playground / "policy"))
    assert own != policys
    (scored,) = score(loaded(folder), [" value"], prompt="Return the").tolist()
    assert scored == pytest.approx(last_token_logit(folder, text), abs=1e-5)


def test_template_can_be_switched_off(classifier_folder):
    folder = classifier_folder(template=TEMPLATE)
    scores = score(loaded(folder, chat_template=False), [" upon"])
    assert scores.item() == pytest.approx(last_token_logit(folder, "Once upon"), abs=1e-5)


def test_model_is_frozen_and_setup_and_close_may_be_repeated(classifier_folder):
    reward = loaded(classifier_folder())
    before = score(reward, COMPLETIONS)
    reward.setup(CPU)
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert torch.equal(score(reward, COMPLETIONS), before)
    reward.close()
    reward.close()
    with pytest.raises(RuntimeError, match="setup"):
        score(reward, COMPLETIONS)


def test_reduced_precision_is_stated_and_warned_about(classifier_folder):
    with pytest.warns(UserWarning, match="rounded and ties"):
        reward = loaded(classifier_folder(), dtype="bfloat16")
    assert "bfloat16" in repr(reward)
    assert torch.isfinite(score(reward, COMPLETIONS)).all()


def test_no_completions_give_no_scores(classifier_folder):
    assert score(loaded(classifier_folder()), []).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be an integer of at least 1"),
        ({"max_length": 0}, "max_length must be an integer of at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifierReward("folder", **settings)


def test_max_length_beyond_the_model_is_an_error(classifier_folder):
    with pytest.raises(ValueError, match=r"max_length=65, but reward model .* takes 64 tokens"):
        loaded(classifier_folder(), max_length=65)


def test_more_than_one_label_is_an_error(classifier_folder):
    with pytest.raises(ValueError, match="it has 3 labels, and a reward model 1"):
        loaded(classifier_folder(num_labels=3))


def test_causal_lm_is_no_reward_model(playground: Path):
    with pytest.raises(ValueError, match="cannot be used as a reward model"):
        loaded(playground / "policy")


def test_model_without_a_trained_head_is_an_error(classifier_folder, byte_tokenizer, tmp_path: Path):
    config = LlamaConfig.from_pretrained(classifier_folder())
    LlamaModel(config).save_pretrained(tmp_path / "trunk")
    byte_tokenizer().save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"lacks score\.weight"):
        loaded(tmp_path / "trunk")


def test_missing_model_and_missing_tokenizer_are_errors(classifier_folder, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        loaded(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"reward model .* has no tokenizer"):
        loaded(classifier_folder(), tokenizer=str(tmp_path / "empty"))
