import pytest
from transformers import LlamaConfig

from tealightning.callbacks.rollout_checks import check_prompts
from tealightning.types import SamplingConfig


def test_completions_that_leave_no_room_for_any_prompt_are_refused_as_such():
    """Not as a prompt that is too long by some negative number of tokens."""
    for most, message in ((128, "leaves no room"), (127, None)):
        sampling = SamplingConfig(max_new_tokens=most)
        if message is None:
            check_prompts({}, LlamaConfig(vocab_size=32), None, sampling, 128)
            continue
        with pytest.raises(ValueError, match=rf"rollout\.sampling\.max_new_tokens={most} {message} .* the 128 tokens"):
            check_prompts({}, LlamaConfig(vocab_size=32), None, sampling, 128)
