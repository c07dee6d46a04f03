"""What runs inside vLLM's worker: weights are loaded, and those that did not arrive are found.

vLLM itself logs a warning at best. In the trainer's process `VLLMEngine` calls this, in a server
`--worker-extension-cls tealightning.rollouts.vllm_worker.Extension` makes it a method of the workers.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from tealightning.errors import UserError
from tealightning.rollouts.base import EngineContext

Weights = Iterable[tuple[str, Tensor]]


def load(worker: Any, weights: Weights, tied: dict[str, list[str]]) -> list[str]:
    """Load weights of a checkpoint through vLLM's own `reload_weights`.

    Args:
        worker: A worker of vLLM.
        weights: `(name, tensor)` with the names and the layout of a checkpoint.
        tied: Further names of tied weights, which are loaded, too, where the model has a parameter of its own for them.

    Returns:
        The model's parameters that did not get all of their elements: they are as they were, or worse. Of some models
        (gpt-oss) all do from the second push on.
    """
    model = worker.get_model()
    own = parameter_names(model)
    # Layers whose parameters the model's loader writes itself, past vLLM's reload; found out by the first push.
    direct: set[str] = model.__dict__.setdefault("directly_written_layers", set())
    incomplete: set[str] = set()
    _forget_packed_experts(model)

    def load_weights(weights: Weights) -> set[str] | None:
        _make_writable(model, direct)
        loaded = type(model).load_weights(model, with_copies(weights, tied, own))
        incomplete.update(_incomplete(model, loaded or set(), direct))
        direct.update(name.rpartition(".")[0] for name in incomplete & (loaded or set()))
        return loaded  # type: ignore[no-any-return]

    model.load_weights = load_weights  # vLLM tells what it has loaded in here only
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    _process_tied(model)
    return sorted(incomplete)


def parameter_names(model: nn.Module) -> list[str]:
    """The name of each parameter that the model keeps; one that is used twice has the first of its names."""
    return [name for name, _ in model.named_parameters()]


def with_copies(weights: Weights, tied: dict[str, list[str]], own: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """`weights`, and each that is tied under those of its further names that are in `own`, too."""
    for name, tensor in weights:
        yield name, tensor.detach()
        for other in tied.get(name, ()):
            if other in own:
                yield other, tensor.detach()


def _forget_packed_experts(model: nn.Module) -> None:
    """Have vLLM pack the experts of its CPU kernel anew: once it has a kernel, it stores new weights as they are, which
    the kernel would read as if they were packed."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None


def _make_writable(model: nn.Module, direct: set[str]) -> None:
    """Give layers that are loaded directly memory at once, where vLLM gives it when the last element has come."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer

    for layer in map(model.get_submodule, direct):
        info = get_layerwise_info(layer)
        materialize_layer(layer, info)
        info.load_numel = max(info.load_numel, 1)  # so that it is processed in the end


def _process_tied(model: nn.Module) -> None:
    """Have the layers that share a parameter read it again: vLLM does so for the one that it loads, and a head keeps a
    packed copy on CPUs."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for module in model.modules():
        shares = any(p is not None and holders[id(p)] > 1 for p in module._parameters.values())
        method: Any = getattr(module, "quant_method", None)
        if shares and method is not None:
            method.process_weights_after_loading(module)


def _incomplete(model: nn.Module, loaded: set[str], direct: set[str]) -> set[str]:
    """The parameters that lack elements, after a model's `load_weights` and before vLLM fills in what is left.

    Counted in the layers that vLLM has not finished, which are those that wait for more.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    arrived: set[int] = set()
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        info = get_layerwise_info(module)
        parameters = module._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
        got = {name for name, _ in info.loaded_weights}
        whole = sum(get_tensor_load_numel(module._parameters[name]) for name in got & module._parameters.keys())
        # Embeddings are padded to a round number of rows, which nothing is loaded into.
        short = info.load_numel < whole and not isinstance(module, VocabParallelEmbedding)
        for name, parameter in parameters.items():
            path = f"{prefix}.{name}".removeprefix(".")
            if parameter is None or name not in info.restore_metadata[0].keys() | SKIP_TENSORS:
                continue  # made of others after loading, as those of latent attention are
            names.setdefault(id(parameter), path)
            # vLLM keeps a few where they are and loads them at once: of those it is to be believed what it says.
            at_once = (name in SKIP_TENSORS or prefix in direct) and path in loaded
            if not info.can_load() or (name in got and not short) or at_once:
                arrived.add(id(parameter))
    return {name for key, name in names.items() if key not in arrived}


def refuse_incomplete(parameters: Sequence[str], context: EngineContext) -> None:
    """Refuse an engine of which a push has left parameters behind."""
    if parameters:
        raise UserError(
            f"vLLM did not take over all weights of {type(context.policy).__name__}: of its parameters, "
            f"{', '.join(parameters[:5])} ({len(parameters)} in all) got nothing or not all. It would sample from "
            "other weights than the trainer's: use --rollout.engine=TransformersEngine with this architecture."
        )


class Extension:
    """Methods of a server's workers, which `VLLMClient` calls by their names."""

    def checkpoint_parameter_names(self) -> list[str]:
        return parameter_names(self.get_model())  # type: ignore[attr-defined]

    def load_checkpoint(self, folder: str) -> list[str]:
        """`load` the safetensors file in a folder."""
        from safetensors import safe_open

        with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
            names = file.keys()
            for _ in range(2):
                incomplete = load(self, ((name, file.get_tensor(name)) for name in names), {})
                if not incomplete:
                    break
        return incomplete
