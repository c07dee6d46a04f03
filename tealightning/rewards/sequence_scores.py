"""Scores of token sequences by a model with one label: each what it would be alone, whatever shares its batch."""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tealightning.training.micro_batches import split_rows

MOST_EFFECT = 1e-3
ROUNDED_EFFECT = 0.1  # with 16 bits
"""How far padding may move a score, relative to how far apart scores are; rounding moves them, too."""


class SequenceScorer:
    """Scores sequences of token ids with a model that has been loaded.

    Batches are padded on the right. A model whose scores that changes (XLNet reads the last position, FNet and
    Nystromformer have no mask for it, convolutions see it) gets sequences of one length together, without any.

    Args:
        model: A `AutoModelForSequenceClassification` with one label, on its device and in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._config = model.config.get_text_config()
        self._own_padding = getattr(self._config, "pad_token_id", None)
        self._vocabulary = _vocabulary(model)
        accepted = inspect.signature(model.forward).parameters
        # The RoBERTa family accepts them, and has a single one.
        self._takes_types = "token_type_ids" in accepted and getattr(self._config, "type_vocab_size", 2) != 1
        rope = getattr(self._config, "rope_parameters", None) or {}
        # transformers turns a BigBird to full attention at its first short sequence, and never back.
        self._sparse = [m for m in model.modules() if getattr(m, "attention_type", "") == "block_sparse"]
        # The longest sequence of a batch decides how others are read or, in Funnel's pooling, the parity of lengths: no
        # trial with some short ones can show it.
        pools = hasattr(self._config, "block_sizes")
        self.pads = not self._sparse and not pools and rope.get("rope_type") != "longrope"

    def try_padding(self, sequences: Sequence[list[int]]) -> float:
        """Score `sequences` together and one by one, and stop padding batches if that makes a difference, which is
        returned: 0 = none beyond rounding. Whatever the model raises is raised."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            alone = torch.cat([self.scores([ids]) for ids in sequences])
            difference = float((self.scores(sequences) - alone).abs().max()) if self.pads else 0.0
        finally:
            torch.set_float32_matmul_precision(precision)
        share = MOST_EFFECT if self.model.dtype == torch.float32 else ROUNDED_EFFECT
        if difference <= share * float(alone.max() - alone.min()) + 1e-5:
            return 0.0
        self.pads = False
        return difference

    def batches(self, lengths: Tensor, rows: Tensor, *, max_tokens: int, max_rows: int) -> list[Tensor]:
        """Partition `rows` [R] of sequences with `lengths` [B] into those to be scored together."""
        groups = [rows] if self.pads else [rows[lengths[rows] == n] for n in lengths[rows].unique().flip(0)]
        limits = {"max_tokens": max_tokens, "max_rows": min(max_rows, self._vocabulary - 1)}
        zeros = torch.zeros_like(lengths)
        return [part for group in groups for part in split_rows(zeros, lengths, group, **limits)]

    @torch.no_grad()
    def scores(self, sequences: Sequence[list[int]], types: Sequence[list[int]] | None = None) -> Tensor:
        """[rows] float64, the model's logit of each sequence; `types` are the ids of the segment of each token."""
        lengths = torch.tensor([len(s) for s in sequences])
        pad = self._padding({s[-1] for s in sequences})
        self.model.config.pad_token_id = self._config.pad_token_id = pad
        inputs = {"input_ids": pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=pad)}
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if types is not None and self._takes_types:
            inputs["token_type_ids"] = pad_sequence([torch.tensor(t) for t in types], batch_first=True)
        with self._as_new():
            logits = self.model(**{name: values.to(self.model.device) for name, values in inputs.items()}).logits
        return logits[:, 0].float().cpu().double()

    def _padding(self, ends: set[int]) -> int:
        """The model's own padding id, from which some tell where a sequence ends and which positions its tokens have.

        Decoders read the score at the rightmost token with another id. That is the last one if, and only if, no
        sequence ends with the padding id; else it is an id that none ends with.
        """
        own = self._own_padding
        if isinstance(own, int) and 0 <= own < self._vocabulary and own not in ends:
            return own
        return next(i for i in range(self._vocabulary) if i not in ends)

    @contextmanager
    def _as_new(self) -> Any:
        """A pass of a BigBird with block-sparse attention as if it were the first; it seeds numpy's global stream."""
        if not self._sparse:
            yield
            return
        state = np.random.get_state()
        for module in self._sparse:
            module.set_attention_type("block_sparse")
        try:
            yield
        finally:
            np.random.set_state(state)


def longest_sequence(model: Any) -> int | None:
    """Tokens that `model` has positions for; None = it does not say. The RoBERTa family begins to count positions
    after the padding id."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(first := getattr(module, "padding_idx", None), int):
            known.append(len(module.weight) - first - 1)
    return min((n for n in known if isinstance(n, int) and n > 0), default=None)


def _vocabulary(model: Any) -> int:
    """Token ids that the model has; a model of characters has no table of them."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return int(getattr(model.config.get_text_config(), "vocab_size", 256))
