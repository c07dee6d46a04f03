"""Encode a prompt and an answer as a pair of texts, as encoders read it: [CLS] prompt [SEP] answer [SEP]."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models

from tealightning.errors import UserError
from tealightning.text.control_tokens import Text, TextEncoder, split_at
from tealightning.types import Prompt


class PairEncoder:
    """Encodes pairs as `tokenizer(prompt, answer)` does, apart from control tokens that a text spells: they are text.

    Args:
        tokenizer: Of a reward model that was trained on pairs.

    Raises:
        ValueError: if the tokenizer puts nothing between two texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._form = pair_form(tokenizer)
        if not separates(self._form):
            raise UserError(
                f"pair=True, but the tokenizer of {tokenizer.name_or_path!r} puts nothing between the two texts of a "
                "pair: leave pair out, and the completion is appended to the prompt."
            )
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._encoder = TextEncoder(tokenizer)

    def encode(
        self, prompts: Sequence[Prompt], answers: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of each pair, and the segment of each token; None = the tokenizer tells of no segments."""
        firsts = self._encoder.encode([self._as_text(_text_of(prompt)) for prompt in prompts])
        seconds = self._encoder.encode([self._as_text(answer) for answer in answers])
        ids: list[list[int]] = []
        types: list[list[int]] = []
        for pair in zip(firsts, seconds, strict=True):
            texts = iter(pair)
            parts = [([token] if token is not None else next(texts), segment) for token, segment in self._form]
            ids.append([token for tokens, _ in parts for token in tokens])
            types.append([segment for tokens, segment in parts for _ in tokens])
        return ids, types if self._has_types else None

    def _as_text(self, text: str) -> Text:
        mark = self._encoder.mark_for(text)
        return text if mark is None else split_at(self._encoder.marked(text, mark), mark)


def pair_form(tokenizer: Any) -> list[tuple[int | None, int]]:
    """The tokens of a pair with their segments, by what the tokenizer does with two tokens: None = those of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = tokenizer.build_inputs_with_special_tokens([None], [None])
        return list(zip(ids, tokenizer.create_token_type_ids_from_sequences([None], [None]), strict=True))
    if backend.post_processor is None:
        return [(None, 0), (None, 0)]
    token = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x", add_special_tokens=False)
    made = backend.post_processor.process(token, token, True)
    rows = zip(made.ids, made.special_tokens_mask, made.type_ids, strict=True)
    return [(token_id if special else None, segment) for token_id, special, segment in rows]


def separates(form: list[tuple[int | None, int]], besides: int | None = None) -> bool:
    """Whether something stands between the texts of a pair, apart from the token `besides`."""
    tokens = [token for token, _ in form]
    first = tokens.index(None)
    return bool(set(tokens[first + 1 : tokens.index(None, first + 1)]) - {besides})


def _text_of(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    content = prompt[0].get("content") if len(prompt) == 1 and prompt[0]["role"] == "user" else None
    if isinstance(content, str):
        return content
    roles = [message["role"] for message in prompt]
    raise UserError(f"pair=True takes a text, or a chat of one user message, as a prompt, got one with roles {roles}.")
