"""An engine's own errors, told with the phase."""

import pytest

from tealightning.rollouts.base import EngineError, engine_phase


def test_memory_errors_say_what_to_change():
    broken = []
    with (
        pytest.raises(EngineError, match=r"^vLLM broke down while generating: MemoryError: 3 GiB\. Lower something\.$"),
        engine_phase("vLLM", "generating", "Lower something.", lambda: broken.append(True)),
    ):
        raise MemoryError("3 GiB")
    assert broken == [True]


def test_other_errors_have_no_advice_and_keep_their_cause():
    with pytest.raises(EngineError) as caught, engine_phase("vLLM", "syncing weights", "Lower.", list):
        raise AssertionError("shape")
    assert str(caught.value) == "vLLM broke down while syncing weights: AssertionError: shape."
    assert isinstance(caught.value.__cause__, AssertionError)


def test_what_it_was_asked_for_is_no_breakdown():
    broken = []
    with pytest.raises(ValueError, match="too long"), engine_phase("vLLM", "generating", "", lambda: broken.append(1)):
        raise ValueError("too long")
    assert broken == []
