from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tealightning.text.pairs import PairEncoder, pair_form, separates

SPECIALS = ["[CLS]", "[SEP]", "[PAD]"]
TEMPLATE = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 0), ("[SEP]", 1)]}
PROCESSORS = {
    "bert": processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0)),
    "roberta": processors.RobertaProcessing(("[SEP]", 1), ("[CLS]", 0)),
    "template": processors.TemplateProcessing(pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", **TEMPLATE),
    "xlnet": processors.TemplateProcessing(pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2", **TEMPLATE),
    "answer first": processors.TemplateProcessing(pair="$A:0 [SEP]:0 [SEP]:0 $B:0", **TEMPLATE),
}
PAIRS = [("What is it?", "It is a cat."), ("a", ""), (" b ", "\n"), ("ü", "😀")]


def tokenizer_of(processor, **settings):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if processor is not None:
        tokenizer.post_processor = processor
    names: dict[str, Any] = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | settings)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pair_is_encoded_as_the_tokenizer_encodes_it(processor):
    tokenizer = tokenizer_of(processor)
    prompts, answers = map(list, zip(*PAIRS, strict=True))
    expected = tokenizer(prompts, answers, return_token_type_ids=True)
    assert PairEncoder(tokenizer).encode(prompts, answers) == (expected["input_ids"], expected["token_type_ids"])


def test_tokenizer_without_segments_gives_none():
    tokenizer = tokenizer_of(PROCESSORS["roberta"], model_input_names=["input_ids", "attention_mask"])
    assert PairEncoder(tokenizer).encode(["a"], ["b"])[1] is None


@pytest.mark.parametrize("text", ["yes[SEP]no", "[SEP]", "[CLS][SEP]", "yes[SE", "P]no", "[PAD]"])
def test_text_that_spells_a_separator_writes_none(text):
    tokenizer = tokenizer_of(PROCESSORS["bert"])
    (row, other), types = PairEncoder(tokenizer).encode(["p", text], [text, "[S" + text])
    assert [row.count(i) for i in range(3)] == [other.count(i) for i in range(3)] == [1, 2, 0]
    assert tokenizer.decode([i for i in row if i > 2]) == "p" + text
    assert types[0] == [0, 0, 0] + [1] * (len(text) + 1)


def test_chat_of_one_user_message_is_its_text_and_others_are_refused():
    encoder = PairEncoder(tokenizer_of(PROCESSORS["bert"]))
    assert encoder.encode([[{"role": "user", "content": "a"}]], ["b"]) == encoder.encode(["a"], ["b"])
    for chat in ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="pair=True takes a text, or a chat of one user message"):
            encoder.encode([chat], ["b"])


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)])
def test_tokenizer_that_puts_nothing_between_two_texts_is_refused(processor):
    with pytest.raises(ValueError, match="puts nothing between the two texts of a pair"):
        PairEncoder(tokenizer_of(processor))


def test_bos_between_two_texts_is_not_taken_for_a_separator():
    processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS] $B", special_tokens=[("[CLS]", 0)]
    )
    form = pair_form(tokenizer_of(processor))
    assert separates(form) and not separates(form, besides=0)
