"""Hand out the trainer's weights for engines to load."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from tealightning.training.lora import merged_names, merged_parameters


def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of every parameter, detached, not copied; with an adapter merged into the weights that it
    adapts, each when its turn comes, so that there is never a second copy of them all.

    Tied parameters appear under every name: an engine that keeps its own copy of `lm_head.weight` would otherwise go on
    with the old one while the embedding that it is tied to moves on.
    """
    return merged_parameters(policy)


def checked_off(weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """`weights`, detached, one at a time; each name that comes by leaves `missing`."""
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor.detach()


def weight_names(policy: nn.Module) -> set[str]:
    """The names in `policy_weights`."""
    return set(merged_names(policy))


def refuse_partial_push(missing: set[str]) -> None:
    """Called when a push has ended, because vLLM cannot end one in the middle.

    Raises:
        ValueError: if a parameter of the policy was missing; an engine would go on with its old value.
    """
    if missing:
        raise ValueError(
            f"sync_weights needs every parameter of the policy, tied ones under each name (policy_weights gives "
            f"them); missing: {', '.join(sorted(missing))}."
        )
