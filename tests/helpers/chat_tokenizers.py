"""Tokenizers of every kind with control tokens, and chat templates of the families that are in use."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
TURNS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = [chr(c) for c in range(33, 127)]

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "trims, as Llama 3 and Gemma do": (
        "{{ bos_token }}{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|end|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "role within a token, as Phi's": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "splits off reasoning, as Qwen's": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "JSON": (
        "{% for m in messages %}<|im_start|>{{ {'role': m['role'], 'content': m['content']} | tojson }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    ),
}  # fmt: skip


def _byte_level(tokens: list[Any]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _byte_level_in_vocabulary(tokens: list[Any]) -> Tokenizer:
    names = [str(getattr(token, "content", token)) for token in tokens]
    vocabulary = {token: i for i, token in enumerate([*names, *BYTES, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _llama2(tokens: list[Any]) -> Tokenizer:
    pieces = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁", *LETTERS]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _unigram(tokens: list[Any]) -> Tokenizer:
    names = [str(getattr(token, "content", token)) for token in tokens]
    pieces = [("<unk>", 0.0), *[(name, 0.0) for name in names], *[(f"<0x{b:02X}>", -20.0) for b in range(256)]]
    pieces += [("▁", -2.0), *[(letter, -4.0) for letter in LETTERS], ("the", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _word_piece(tokens: list[Any]) -> Tokenizer:
    names = [str(getattr(token, "content", token)) for token in tokens]
    pieces = ["[UNK]", *names, *LETTERS, *[f"##{letter}" for letter in LETTERS]]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _words(tokens: list[Any]) -> Tokenizer:
    names = [str(getattr(token, "content", token)) for token in tokens]
    pieces = ["[UNK]", *names, *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _stripping(tokens: list[Any]) -> Tokenizer:
    return _byte_level([AddedToken(str(token), lstrip=i % 2 == 0, rstrip=i % 3 == 0) for i, token in enumerate(tokens)])


def _normalized(tokens: list[Any]) -> Tokenizer:
    tokenizer = _byte_level([])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken(str(token), normalized=True) for token in tokens])
    return tokenizer


def _not_special(tokens: list[Any]) -> Tokenizer:
    """As DeepSeek's, whose tokens of the turns are added ones that are not called special."""
    tokenizer = _byte_level([BOS, EOS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens[2:]])
    return tokenizer


KINDS: dict[str, Callable[[list[Any]], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, control tokens in the vocabulary": _byte_level_in_vocabulary,
    "BPE with byte fallback and a prepended space": _llama2,
    "Unigram with byte fallback, which takes text for control tokens": _unigram,
    "WordPiece": _word_piece,
    "whole words": _words,
    "tokens that strip": _stripping,
    "tokens that are normalized": _normalized,
    "tokens of turns that are not special": _not_special,
}
LOSSLESS = [kind for kind in KINDS if kind not in ("WordPiece", "whole words", "tokens that strip")]


def chat_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind, which puts `<s>` before a text, with a template by its name."""
    backend = KINDS[kind]([BOS, EOS, *TURNS])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = None if template is None else TEMPLATES[template]
    return tokenizer
