"""Texts of an exact number of tokens."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any


def exact_texts(tokenizer: Any, texts: Sequence[str], tokens: int, count: int = 64) -> list[str]:
    """`count` different texts that `tokenizer` encodes as exactly `tokens` tokens, special ones included.

    They are pieces of `texts`, joined and repeated as often as needed; no two begin at the same place, so that no cache
    of prefixes helps.

    Raises:
        ValueError: if there are not enough of them.
    """
    special = len(tokenizer("")["input_ids"])
    wanted = tokens - special
    if wanted < 1:
        raise ValueError(f"--prompt-tokens must be at least {special + 1} with this tokenizer, got {tokens}.")
    corpus = tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = list(islice(cycle(corpus), len(corpus) + wanted))
    found: dict[str, None] = {}
    for start in range(len(corpus)):
        text = tokenizer.decode(stream[start : start + wanted])
        # What is cut from a text may be encoded in other tokens than inside it.
        if len(tokenizer(text)["input_ids"]) == tokens:
            found[text] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"--prompt-tokens {tokens}: only {len(found)} of {count} prompts of this length were found.")
