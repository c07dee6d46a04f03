"""The trainer's weights, as engines take them over."""

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
