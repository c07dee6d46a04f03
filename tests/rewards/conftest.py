"""Tokenizers and reward models small enough to be made in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer  # noqa: F401 - a fixture
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def classifier_folder(
    tmp_path: Path,
    byte_tokenizer: Callable[..., PreTrainedTokenizerFast],  # noqa: F811 - the fixture
) -> Callable[..., Path]:
    """Saves a random `LlamaForSequenceClassification` with its tokenizer and returns the folder."""

    def make(*, template: str | None = None, head_scale: float = 1.0, **config: Any) -> Path:
        torch.manual_seed(0)
        settings = {"num_labels": 1, "pad_token_id": 2, "vocab_size": 259, "max_position_embeddings": 64} | config
        model = LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=1,
                **settings,
            )
        )
        model.score.weight.data *= head_scale
        folder = tmp_path / f"classifier_{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        byte_tokenizer(template=template).save_pretrained(folder)
        return folder

    return make
