"""Export of a policy in Hugging Face format, and a trial of it that needs no weights."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tealightning.errors import UserError

_GENERATION = "generation_config.json"


def save_policy(policy: Any, tokenizer: Any, folder: str, state: dict[str, Any]) -> None:
    """Save a transformers model and its tokenizer. The defaults for generation that came with the model stay as they
    were: transformers refuses to save some that it has loaded, such as a temperature without `do_sample`."""
    given = getattr(policy, "generation_config", None)
    if given is not None:
        policy.generation_config = type(given)()
    try:
        policy.save_pretrained(folder, state_dict=_with_ties_that_are_not_declared(policy, state))
    finally:
        if given is not None:
            policy.generation_config = given
    if given is not None:
        given.to_json_file(Path(folder) / _GENERATION, use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def _with_ties_that_are_not_declared(policy: Any, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with a copy of each tensor that is there under a second name which transformers does not tie on loading:
    a safetensors file has no aliases, and saving would fail."""
    declared = set(getattr(policy, "all_tied_weights_keys", None) or ())
    state, seen = dict(state), set[tuple[Any, ...]]()
    for name, value in state.items():
        if name not in declared and hasattr(value, "data_ptr") and value.numel():
            where = (value.device, value.data_ptr(), value.shape, value.stride())
            if where in seen:
                state[name] = value.clone()
            seen.add(where)
    return state


def try_export(path: str, config: Any, tokenizer: Any, *, argument: str = "policy") -> None:
    """Refuse a policy whose settings or tokenizer cannot be saved, by saving them: all of an export but the weights."""
    from transformers import GenerationConfig

    file = Path(path) / _GENERATION
    doing = "read its generation_config.json"
    try:
        if file.is_file():
            given = GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        else:
            given = GenerationConfig.from_model_config(config)
        with tempfile.TemporaryDirectory() as folder:
            doing = "save its generation_config.json"
            given.to_json_file(Path(folder) / _GENERATION, use_diff=True, keys_to_pop=["compile_config"])
            doing = "save its config.json"
            config.save_pretrained(folder)
            doing = "save its tokenizer"
            tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever transformers or code that came with the model raises
        raise UserError(
            f"{argument} {path!r}: transformers cannot {doing}, and the export after training would fail "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Mend the file in that folder."
        ) from error
