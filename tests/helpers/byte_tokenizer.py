"""A tokenizer small enough to be made in a test."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes byte-level tokenizers: `<bos>` 0, `<eos>` 1, `<pad>` 2, then the bytes."""

    def make(*, template: str | None = None, adds_bos: bool = False, adds_eos: bool = False) -> PreTrainedTokenizerFast:
        specials = ["<bos>", "<eos>", "<pad>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        single = ["<bos>"] * adds_bos + ["$A"] + ["<eos>"] * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=64
        )
        fast.chat_template = template
        return fast

    return make
