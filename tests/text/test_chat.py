from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tealightning.text.chat import ChatFormatter

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}]


def test_plain_prompt_is_used_as_it_is_without_a_template(byte_tokenizer):
    tokenizer = byte_tokenizer()
    (ids,) = ChatFormatter(tokenizer).encode_prompts(["ab c"])
    assert tokenizer.decode(ids) == "ab c"
    assert len(ids) == 4


def test_chat_prompt_gets_the_template_and_the_generation_prompt_once(byte_tokenizer):
    tokenizer = byte_tokenizer(template=TEMPLATE, adds_bos=True, adds_eos=True)
    (ids,) = ChatFormatter(tokenizer).encode_prompts([CHAT])
    assert tokenizer.decode(ids) == "<bos><user>hi<eos><assistant>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_plain_prompt_becomes_a_user_message_where_there_is_a_template(byte_tokenizer):
    formatter = ChatFormatter(byte_tokenizer(template=TEMPLATE))
    assert formatter.encode_prompts(["hi"]) == formatter.encode_prompts([CHAT])


def test_template_can_be_switched_off_for_continuation(byte_tokenizer):
    tokenizer = byte_tokenizer(template=TEMPLATE)
    (ids,) = ChatFormatter(tokenizer, False).encode_prompts(["hi"])
    assert tokenizer.decode(ids) == "hi"


def test_plain_prompt_has_one_bos_and_no_appended_eos(byte_tokenizer):
    tokenizer = byte_tokenizer(adds_bos=True, adds_eos=True)
    formatter = ChatFormatter(tokenizer)
    decoded = [tokenizer.decode(ids) for ids in formatter.encode_prompts(["ab", "<bos>ab", "ab<eos>"])]
    assert decoded == ["<bos>ab", "<bos>ab", "<bos>ab<eos>"]  # the last eos is the user's own


def test_bos_in_a_text_stays_where_the_tokenizer_adds_none(byte_tokenizer):
    tokenizer = byte_tokenizer()
    (ids,) = ChatFormatter(tokenizer).encode_prompts(["<bos>ab"])
    assert tokenizer.decode(ids) == "<bos>ab"


def test_system_prompt_goes_first_unless_the_chat_has_its_own(byte_tokenizer):
    tokenizer = byte_tokenizer(template=TEMPLATE)
    own = [{"role": "system", "content": "mine"}, *CHAT]
    encoded = ChatFormatter(tokenizer).encode_prompts([CHAT, own], system_prompt="short")
    assert tokenizer.decode(encoded[0]) == "<bos><system>short<eos><user>hi<eos><assistant>"
    assert tokenizer.decode(encoded[1]) == "<bos><system>mine<eos><user>hi<eos><assistant>"


def test_answers_are_an_assistant_message_or_appended_text(byte_tokenizer):
    with_template, without = byte_tokenizer(template=TEMPLATE), byte_tokenizer()
    (chat,) = ChatFormatter(with_template).encode_answers([CHAT], ["yo"])
    (plain,) = ChatFormatter(without).encode_answers(["hi"], ["yo"])
    assert with_template.decode(chat) == "<bos><user>hi<eos><assistant>yo<eos>"
    assert without.decode(plain) == "hiyo"


def test_template_file_replaces_the_tokenizers(byte_tokenizer, tmp_path: Path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = byte_tokenizer()
    (ids,) = ChatFormatter(tokenizer, str(file)).encode_prompts([CHAT])
    assert tokenizer.decode(ids) == "[hi]"


def test_no_prompts_give_no_tokens(byte_tokenizer):
    assert ChatFormatter(byte_tokenizer()).encode_prompts([]) == []


def test_missing_template_file_is_named(byte_tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file is at .*none\.jinja"):
        ChatFormatter(byte_tokenizer(), str(tmp_path / "none.jinja"))


def test_true_needs_a_template(byte_tokenizer):
    with pytest.raises(ValueError, match="chat_template=True, but the tokenizer"):
        ChatFormatter(byte_tokenizer(), True)


@pytest.mark.parametrize("setting", ["auto", False])
def test_chat_without_a_template_is_an_error(byte_tokenizer, setting):
    formatter = ChatFormatter(byte_tokenizer(), setting)
    with pytest.raises(ValueError, match="a prompt is a chat, but the tokenizer"):
        formatter.encode_prompts([CHAT])
    with pytest.raises(ValueError, match="a prompt is a chat, but the tokenizer"):
        formatter.encode_answers([CHAT], ["yo"])


def test_system_prompt_without_a_template_is_an_error(byte_tokenizer):
    with pytest.raises(ValueError, match="system_prompt needs a chat template"):
        ChatFormatter(byte_tokenizer()).encode_prompts(["hi"], system_prompt="short")


def test_chat_that_the_template_refuses_is_an_error(byte_tokenizer):
    formatter = ChatFormatter(byte_tokenizer(template="{{ raise_exception('no system role') }}"))
    with pytest.raises(ValueError, match=r"refuses a chat with the roles \['user'\]: no system role"):
        formatter.encode_prompts([CHAT])


@pytest.mark.parametrize("single", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <pad> $A <eos> <eos>"])
def test_special_tokens_are_those_of_the_post_processor(single):
    """Of an alphabet without the letter "a", as those of DNA and of proteins are."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", "G", "C", "T"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    specials = [(token, vocabulary[token]) for token in ("<bos>", "<eos>", "<pad>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    before = [vocabulary[token] for token in single.partition("$A")[0].split()]
    assert ChatFormatter(tokenizer).encode_prompts(["GCT", "G"]) == [[*before, 4, 5, 6], [*before, 4]]
    answered = tokenizer("GCT")["input_ids"]
    assert ChatFormatter(tokenizer).encode_answers(["GC"], ["T"]) == [answered]
    tokenizer("GCT", padding="max_length", max_length=40)  # leaves padding switched on in the tokenizer
    assert ChatFormatter(tokenizer).encode_prompts(["G"]) == [[*before, 4]]
