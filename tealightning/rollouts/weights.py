"""The trainer's weights, as engines take them over."""

from collections.abc import Iterable

from torch import Tensor, nn


def policy_weights(policy: nn.Module) -> list[tuple[str, Tensor]]:
    """`(name, tensor)` of every parameter, detached, not copied.

    Tied parameters appear under every name: an engine that keeps its own copy of `lm_head.weight` would otherwise go on
    with the old one while the embedding that it is tied to moves on.
    """
    return [
        (name.replace("_orig_mod.", ""), parameter.detach())  # the prefix that torch.compile adds
        for name, parameter in policy.named_parameters(remove_duplicate=False)
    ]


def checked_weights(weights: Iterable[tuple[str, Tensor]], policy: nn.Module) -> list[tuple[str, Tensor]]:
    """`weights` as a list, detached.

    Raises:
        ValueError: if a parameter of the policy is missing; an engine would go on with its old value.
    """
    named = [(name, tensor.detach()) for name, tensor in weights]
    missing = {name for name, _ in policy_weights(policy)} - {name for name, _ in named}
    if missing:
        raise ValueError(
            f"sync_weights needs every parameter of the policy, tied ones under each name (policy_weights gives "
            f"them); missing: {', '.join(sorted(missing))}."
        )
    return named
