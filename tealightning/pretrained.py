"""Load policies and tokenizers through transformers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tealightning.adapter_folder import find_adapter, merged, refuse_quantized
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
    """The causal LM at `path` (a folder or hub id, which error messages call `argument`) in eval mode, so that training
    scores tokens exactly as sampling did (no dropout). `dtype` is "float32", "bfloat16" or "auto" (as saved). Of an
    adapter the base is loaded, and it is merged."""
    from transformers import AutoModelForCausalLM

    with _loading(path, argument, "is no folder or hub id of a causal LM"):
        refuse_pickled_weights(path, argument)
        if adapter := find_adapter(path, argument):
            base = load_policy(
                adapter.base, dtype=dtype, trust_remote_code=trust_remote_code, argument=f"{adapter.name}: base"
            )
            refuse_quantized(base.config, adapter)
            model = merged(base, adapter)
        else:
            try:
                model, info = AutoModelForCausalLM.from_pretrained(
                    path,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    output_loading_info=True,
                )
            except (OSError, ValueError) as error:
                refuse_pickled_weights(path, argument, error)
                raise
            if missing := ", ".join(sorted(info["missing_keys"])[:5]):
                raise UserError(
                    f"{argument} {path!r} has no weights for {missing}, which would be random numbers: does its "
                    "config.json belong to these weights, and is it a causal LM?"
                )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # PyTorch's fused attention cannot cap scores (Gemma 2), and transformers leaves the cap out in silence.
        model.set_attn_implementation("eager")
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()  # transformers checkpoints in train mode only
        for module in model.modules():  # still without dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def policy_config(path: str, *, trust_remote_code: bool = False, argument: str = "policy") -> Any:
    """The configuration of the causal LM at `path`, without its weights; of an adapter that of the merged model."""
    from transformers import AutoConfig

    with _loading(path, argument, "is no folder or hub id of a causal LM"):
        if adapter := find_adapter(path, argument):
            config = policy_config(adapter.base, trust_remote_code=trust_remote_code, argument=f"{adapter.name}: base")
            refuse_quantized(config, adapter)
            text = config.get_text_config()
            text.vocab_size = adapter.num_embeddings() or text.vocab_size
            return config
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def base_of(path: str, *, argument: str = "policy") -> str:
    """Folder or hub id of the model at `path`: of an adapter that of its base, whose weights are other ones."""
    adapter = find_adapter(path, argument)
    return path if adapter is None else base_of(adapter.base, argument=f"{adapter.name}: base")


def load_tokenizer(path: str, *, trust_remote_code: bool = False, argument: str = "policy") -> Any:
    """The tokenizer saved with a model, or else with its base; its pad token falls back to eos (masks come from
    lengths, so that is safe)."""
    from transformers import AutoTokenizer
    from transformers.utils import has_file

    with _loading(path, argument, "has no tokenizer that transformers can load"):
        if (adapter := find_adapter(path, argument)) and not has_file(path, "tokenizer_config.json"):
            path = base_of(adapter.base, argument=f"{adapter.name}: base")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(config: Any) -> int | None:
    """Tokens that a model with this configuration has positions for; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_weights(path: str, *, argument: str = "policy") -> None:
    """Refuse what is neither a hub id nor a folder with safetensors weights; also the base of an adapter."""
    _check_exists(path, argument)
    refuse_pickled_weights(path, argument)
    folder = Path(path)
    if folder.is_dir() and (adapter := find_adapter(path, argument)):
        check_weights(adapter.base, argument=f"{adapter.name}: base")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{argument} {path!r}: the folder has no weights (model.safetensors).")


def refuse_pickled_weights(path: str, argument: str, error: Exception | None = None) -> None:
    """Refuse weights of which none are safetensors: unpickling can run any code, and a model is often a stranger's.
    What loading with safetensors alone has raised, `error`, tells of files on the hub."""
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


@contextmanager
def _loading(path: str, argument: str, problem: str) -> Iterator[None]:
    """Let errors inside name the path and what is wrong with it."""
    _check_exists(path, argument)
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {path!r} {problem}: {error}") from error
    except Exception as error:  # a configuration that cannot be is met by whatever line of transformers needs it first
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or type(error).__module__.startswith(
            "tealightning."
        ):
            raise  # a deadline, for one
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{argument} {path!r} cannot be loaded ({what}): are its config.json and weights right?"
        ) from error


def _check_exists(path: str, argument: str) -> None:
    """Say at once what asking the hub about a mistyped folder would only say after retries."""
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(path):
        raise UserError(
            f"{argument} {path!r}: there is no such folder (looked in {Path.cwd()}), and it is no hub id (`org/name`). "
            "`tealightning playground --help` says how to build the policies of the example configs."
        )
