"""Prompt sets of numbered prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tealightning.data.prompts import PromptSet, build_prompt_set
from tealightning.text.chat import ChatFormatter


@pytest.fixture
def policy_tokenizer(playground: Path) -> Any:
    """The playground's: byte-level, without a chat template."""
    return AutoTokenizer.from_pretrained(playground / "policy")


@pytest.fixture
def prompt_set(policy_tokenizer: Any) -> Callable[..., PromptSet]:
    """A set from rows, or of that many prompts with the identifiers 0, 1, ..."""

    def make(rows: int | list[dict[str, Any]], **settings: Any) -> PromptSet:
        if isinstance(rows, int):
            rows = [{"prompt": f"prompt {i}"} for i in range(rows)]
        return build_prompt_set(rows, source="data", formatter=ChatFormatter(policy_tokenizer), **settings)

    return make
