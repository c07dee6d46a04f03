"""Adapter folders of peft (`adapter_config.json`, no weights of a model) as models: merged into their base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tealightning.errors import MissingPackageError, UserError

_OWN_PREFIX = "base_model.model."


@dataclass(kw_only=True, slots=True)
class Adapter:
    """What an adapter folder says of itself."""

    name: str  # as messages call it: argument and path
    path: str
    kind: str  # LORA, IA3, ...
    base: str  # folder or hub id of the model that it was trained on
    modules: list[str]  # that are saved whole, such as a score head
    shapes: dict[str, list[int]]  # of the saved weights, by name in the base model or in the adapter

    @property
    def num_labels(self) -> int | None:
        """Rows of the head that is saved beside the adapter; None = the base's head."""
        heads = [shape for name, shape in self.shapes.items() if set(name.split(".")) & set(self.modules)]
        return min((shape[0] for shape in heads if len(shape) == 2), default=None)

    def num_embeddings(self, model: Any = None) -> int | None:
        """Rows of the embedding that is saved beside the adapter; None = the base's."""
        names = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
        if model is not None:
            names = tuple(n.split(".")[-1] for n, m in model.named_modules() if m is model.get_input_embeddings())
        suffixes = tuple(f"{name}{ending}" for name in names for ending in (".weight", ".base_layer.weight"))
        return next((shape[0] for name, shape in self.shapes.items() if name.endswith(suffixes)), None)


def find_adapter(path: str, argument: str) -> Adapter | None:
    """The adapter in a folder or hub repository; None = there is none, or weights of a model lie beside it.

    Raises:
        ImportError: if peft is not installed.
        UserError: if it names no base, its base is not there, or adapters of its type cannot be merged.
    """
    from transformers.utils import cached_file, find_adapter_config_file, has_file

    folder = Path(path)
    if find_adapter_config_file(path) is None or any(folder.glob("model*.safetensors")):
        return None
    if not folder.is_dir() and has_file(path, "config.json"):
        return None
    name = f"{argument} {path!r}"
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise MissingPackageError(
            f'{name} is an adapter of peft, which cannot be imported ({error}): pip install "tealightning[lora]".'
        ) from error
    from safetensors import safe_open

    try:
        config = PeftConfig.from_pretrained(path)
        file = cached_file(path, "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError) as error:  # what peft raises on settings that it does not know
        raise UserError(f"{name} is an adapter that cannot be read: {error}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise UserError(
            f"{name} is an adapter of type {kind}, which puts virtual tokens before the prompt: it cannot be merged "
            "into a model's weights. Use LoRA or another type that peft's merge_and_unload merges."
        )
    base = config.base_model_name_or_path
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise UserError(
            f"{name} is an adapter, and its base model {base!r} is not there: set base_model_name_or_path in its "
            "adapter_config.json to the folder or hub id of the model that it was trained on."
        )
    with safe_open(file, framework="pt") as weights:
        shapes = {key.removeprefix(_OWN_PREFIX): weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    modules = list(getattr(config, "modules_to_save", None) or [])
    if config.task_type == "SEQ_CLS":
        modules += ["classifier", "score"]  # what peft itself adds
    return Adapter(name=name, path=path, kind=kind, base=base, modules=modules, shapes=shapes)


def refuse_quantized(config: Any, adapter: Adapter) -> None:
    """Refuse a base whose weights are not numbers that an update can be added to."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{adapter.name} is an adapter whose base model {adapter.base!r} is quantized: merged, the update would be "
            "rounded away. Set base_model_name_or_path in its adapter_config.json to the model in full precision."
        )


def merged(model: Any, adapter: Adapter) -> Any:
    """Merge an adapter into its base, in place; a UserError says that they do not fit or cannot be merged."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    rows = adapter.num_embeddings(model)
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    own, frozen = set(model.state_dict()), {name for name, p in model.named_parameters() if not p.requires_grad}
    try:
        wrapped = PeftModel.from_pretrained(model, adapter.path, use_safetensors=True)
        found = {name.removeprefix(_OWN_PREFIX) for name in get_peft_model_state_dict(wrapped)}
        strange = {name for name in found ^ set(adapter.shapes) if _plain(name) not in own}
        if strange:
            raise ValueError(f"its weights are not those that the base model takes, such as {sorted(strange)[0]}")
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if isinstance(layer, BaseTunerLayer):  # what it is tied to would be updated with it
                embedding: Any = layer.get_base_layer()
                embedding.weight = nn.Parameter(embedding.weight.detach().clone())
        whole = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{adapter.name} is an adapter of type {adapter.kind} that cannot be merged into its base model "
            f"{adapter.base!r}: {error}"
        ) from error
    for name, parameter in whole.named_parameters():  # peft has frozen the base
        parameter.requires_grad_(name not in frozen)
    return whole


def _plain(name: str) -> str:
    """The name of a weight that peft saves whole, in the base model."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
