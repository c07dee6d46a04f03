"""Load policies and tokenizers through transformers."""

import re
from pathlib import Path
from typing import Any

import torch

from tealightning.errors import UserError

_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_policy(
    path: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    argument: str = "policy",
) -> Any:
    """A causal LM in eval mode, so that training scores tokens exactly as sampling did (no dropout).

    Args:
        path: Folder or hub id.
        dtype: "float32", "bfloat16" or "auto" (as saved).
        argument: What error messages call the path.

    Raises:
        ValueError: if there is no loadable causal LM at `path`.
    """
    from transformers import AutoModelForCausalLM

    _check_exists(path, argument)
    refuse_pickled_weights(path, argument)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        refuse_pickled_weights(path, argument, error)
        raise UserError(f"{argument} {path!r} is no folder or hub id of a causal LM: {error}") from error
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
        _train_mode_without_dropout(model)  # transformers checkpoints in train mode only
    return model


def policy_config(path: str, *, trust_remote_code: bool = False, argument: str = "policy") -> Any:
    """The configuration of the causal LM at `path`, without its weights.

    Raises:
        ValueError: if there is no such model.
    """
    from transformers import AutoConfig

    _check_exists(path, argument)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {path!r} is no folder or hub id of a causal LM: {error}") from error


def positions_of(config: Any) -> int | None:
    """Tokens that a model with this configuration has positions for; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_weights(path: str, *, argument: str = "policy") -> None:
    """
    Raises:
        ValueError: if `path` is neither a hub id nor a folder with safetensors weights.
    """
    _check_exists(path, argument)
    refuse_pickled_weights(path, argument)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{argument} {path!r}: the folder has no weights (model.safetensors).")


def load_tokenizer(path: str, *, trust_remote_code: bool = False, argument: str = "policy") -> Any:
    """The tokenizer saved with a model; its pad token falls back to eos (masks come from lengths, so that is safe).

    Raises:
        ValueError: if there is no tokenizer at `path`.
    """
    from transformers import AutoTokenizer

    _check_exists(path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {path!r} has no tokenizer that transformers can load: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def refuse_pickled_weights(path: str, argument: str, error: Exception | None = None) -> None:
    """Unpickling can run any code, and a model is often a stranger's: weights are safetensors or are not loaded.

    Args:
        path: Folder or hub id.
        argument: What the error message calls it.
        error: What loading it with safetensors alone has raised, which tells of files on the hub.

    Raises:
        ValueError: if there are weights, and none as safetensors.
    """
    folder = Path(path)
    pickled = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))] if folder.is_dir() else []
    if any(folder.glob("*.safetensors")) or not (pickled or "safetensors" in str(error)):
        return
    only = f", only {pickled[0]}" if pickled else ""
    raise UserError(
        f"{argument} {path!r} has no safetensors weights{only}. Pickled weights are not loaded, because a pickle can "
        "run code. If you trust their author, convert them once, with the model's class of transformers: "
        f"from_pretrained({path!r}).save_pretrained('converted')"
    ) from error


def _check_exists(path: str, argument: str = "policy") -> None:
    """Say at once what asking the hub about a mistyped folder would only say after retries."""
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(path):
        raise UserError(
            f"{argument} {path!r}: there is no such folder (looked in {Path.cwd()}), and it is no hub id (`org/name`). "
            "`tealightning playground --help` says how to build the policies of the example configs."
        )


def _train_mode_without_dropout(model: torch.nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
